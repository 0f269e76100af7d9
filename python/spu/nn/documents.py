"""Attention of rows that hold several documents, or one and padding: each document by itself, without its row's mask.

A mask has tokens x tokens values, which torch makes into floating-point ones in every layer and keeps for the backward:
on a CPU 64 MB a row and layer at 4,096 tokens. Documents that follow one another need none: each is causal by itself.
Neither does a document with padding behind it, whose queries see all of the document's keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from spu.common.known import Known
from spu.ops.documents import Lengths, parts_of
from spu.ops.plain import fake

__all__ = ["by_documents", "document_lengths", "document_mask"]

# Multiply-adds that take as long as a call beside a kernel's work: on a CPU; elsewhere by arithmetic, 0.1 ms of calls
# forward and backward beside 20 TFLOP/s.
_CALL, _CALL_ELSEWHERE = 1 << 20, 1 << 27


def document_mask(lengths: Lengths, tokens: int, device: torch.device) -> Tensor:
    """Return the mask of rows that hold several documents, or one and padding; ``document_lengths`` knows it unseen.

    Args:
        lengths: of each row's documents. They add up to ``tokens``, or a row holds one, and padding behind it.

    Returns:
        bool [batch, 1, tokens, tokens]: a query sees its own document up to itself; padding all of the one before it.
    """
    mask = _filled(lengths, tokens, device)
    _lengths.note(mask, [list(row) for row in lengths])
    return mask


def _filled(lengths: Lengths, tokens: int, device: torch.device) -> Tensor:
    longest = max(map(max, lengths))
    mask = torch.zeros(len(lengths), 1, tokens, tokens, dtype=torch.bool, device=device)
    seen = torch.ones(longest, longest, dtype=torch.bool, device=device).tril_()
    for row, queries, keys, causal in parts_of(lengths, tokens):
        length = keys.stop - keys.start
        mask[row, 0, queries, keys] = seen[:length, :length] if causal else True
    return mask


def document_lengths(mask: Tensor, heads_size: int) -> list[list[int]] | None:
    """Return the lengths of each row's documents, if a mask is what ``document_mask`` makes of them. All layers of a
    stage ask with one mask, which is looked at once (a GPU is waited for meanwhile).

    Args:
        mask: bool [batch, 1, tokens, tokens], True where a query (third dimension) sees a key.
        heads_size: heads x head_dim, of a query.

    Returns:
        Lengths that add up to less than the tokens: padding follows. None for any other mask (a window, padding on the
        left), where documents are so short that a call for each would take longer than the mask, and while a CUDA graph
        is captured, in which no value can be read.
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
    lengths = _lengths(mask)
    return None if lengths is None or max(map(len, lengths)) > most else lengths


@Known
def _lengths(mask: Tensor) -> list[list[int]] | None:
    tokens = mask.shape[2]
    before = mask[:, 0].diagonal(-1, 1, 2)  # [batch, tokens - 1]: who sees the token before it
    lengths = []
    for row in torch.cat([before, mask[:, 0, -1]], 1).tolist():
        sees, last = row[: tokens - 1], row[tokens - 1 :]
        begins = [0, *(at + 1 for at, seen in enumerate(sees) if not seen), tokens] if last[-1] else [0, sum(last)]
        lengths.append([end - begin for begin, end in itertools.pairwise(begins)])
    if not all(map(all, lengths)) or not torch.equal(mask, _filled(lengths, tokens, mask.device)):
        return None
    return lengths


def by_documents(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[list[int]], function: Callable[..., Tensor]
) -> Tensor:
    """Return the attention of every document by itself.

    Args:
        query, key, value: [batch, heads, tokens, head_dim]
        lengths: of each row's documents, as ``document_lengths`` has them.
        function: (q [1, heads, queries, head_dim], k, v [1, heads, keys, head_dim], causal) -> [1, queries, heads,
            head_dim]; causal: as many queries as keys, and each sees those up to itself.

    Returns:
        [batch, tokens, heads, head_dim]
    """
    rows: list[list[Tensor]] = [[] for _ in lengths]
    for row, queries, keys, causal in parts_of(lengths, query.shape[2]):
        one = slice(row, row + 1)
        rows[row].append(function(query[one, :, queries], key[one, :, keys], value[one, :, keys], causal))
    return torch.cat([torch.cat(parts, 1) for parts in rows])
