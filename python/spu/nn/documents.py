"""Attention of rows that hold several documents: each document by itself, without its row's mask.

A mask has tokens x tokens values, which torch makes into floating-point ones in every layer and keeps for the backward:
on a CPU 64 MB a row and layer at 4,096 tokens. Documents that follow one another need none: each is causal by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from spu.common.torch_private import version
from spu.ops.plain import fake

__all__ = ["by_documents", "document_lengths", "document_mask"]

# Multiply-adds that take as long as a call beside a kernel's work: on a CPU; elsewhere by arithmetic, 0.1 ms of calls
# forward and backward beside 20 TFLOP/s.
_CALL, _CALL_ELSEWHERE = 1 << 20, 1 << 27
_KNOWN = WeakTensorKeyDictionary()  # mask -> (version, lengths)


def document_mask(lengths: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return the mask of rows that hold several documents; ``document_lengths`` knows it without looking.

    Args:
        lengths: of each row's documents; the same sum in every row.

    Returns:
        bool [batch, 1, tokens, tokens]: a query sees its own document up to itself.
    """
    mask = _filled(lengths, device)
    _KNOWN[mask] = version(mask), [list(row) for row in lengths]
    return mask


def _filled(lengths: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    tokens, longest = sum(lengths[0]), max(map(max, lengths))
    mask = torch.zeros(len(lengths), 1, tokens, tokens, dtype=torch.bool, device=device)
    seen = torch.ones(longest, longest, dtype=torch.bool, device=device).tril_()
    for row, own in zip(mask[:, 0], lengths, strict=True):
        for end, length in zip(itertools.accumulate(own), own, strict=True):
            row[end - length : end, end - length : end] = seen[:length, :length]
    return mask


def document_lengths(mask: Tensor, heads_size: int) -> list[list[int]] | None:
    """Return the lengths of each row's documents, if a mask hides all but a token's own document up to itself. All
    layers of a stage ask with one mask, which is looked at once (a GPU is waited for meanwhile).

    Args:
        mask: bool [batch, 1, tokens, tokens], True where a query (third dimension) sees a key.
        heads_size: heads x head_dim, of a query.

    Returns:
        None for any other mask (a window, padding that sees nothing), where documents are so short that a call for each
        would take longer than the mask, and while a CUDA graph is captured, in which no value can be read.
    """
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        return None
    if not mask.numel() or mask.is_inference() or mask.is_meta or fake(mask):
        return None
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    most = mask.shape[2] ** 2 * heads_size // (_CALL if mask.device.type == "cpu" else _CALL_ELSEWHERE)
    if most < 2:
        return None
    known = _KNOWN.get(mask)
    if known is None or known[0] != version(mask):
        known = _KNOWN[mask] = version(mask), _lengths(mask)
    lengths: list[list[int]] | None = known[1]
    return None if lengths is None or max(map(len, lengths)) > most else lengths


def _lengths(mask: Tensor) -> list[list[int]] | None:
    tokens = mask.shape[2]
    hidden = (~mask[:, 0].diagonal(-1, 1, 2)).tolist()  # who does not see the token before begins a document
    rows = [[0, *(at + 1 for at, begins in enumerate(row) if begins), tokens] for row in hidden]
    lengths = [[end - begin for begin, end in itertools.pairwise(row)] for row in rows]
    return lengths if torch.equal(mask, _filled(lengths, mask.device)) else None


def by_documents(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[list[int]], function: Callable[..., Tensor | None]
) -> Tensor | None:
    """Return the attention of every document by itself.

    Args:
        query, key, value: [batch, heads, tokens, head_dim]
        lengths: of each row's documents.
        function: computes it for one, [1, heads, length, head_dim] three times -> [1, length, heads, head_dim]; or
            gives None, for these and all others.

    Returns:
        [batch, tokens, heads, head_dim]; None where the function gives it.
    """
    rows = []
    for one, own in zip(zip(*(x.split(1) for x in (query, key, value)), strict=True), lengths, strict=True):
        parts = []
        for document in zip(*(x.split(own, 2) for x in one), strict=True):
            done = function(*document)
            if done is None:
                return None
            parts.append(done)
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows)
