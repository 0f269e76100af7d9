"""Attention of rows that hold several documents: each document by itself, without its row's mask.

A mask has tokens x tokens values, which torch makes into floating-point ones in every layer and keeps for the backward:
on a CPU 64 MB a row and layer at 4,096 tokens. Documents that follow one another need none: each is causal by itself.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from spu.common.torch_private import version
from spu.ops.plain import fake

__all__ = ["by_documents", "document_lengths"]

# Multiply-adds that take as long as a call beside a kernel's work: on a CPU; elsewhere by arithmetic, 0.1 ms of calls
# forward and backward beside 20 TFLOP/s.
_CALL, _CALL_ELSEWHERE = 1 << 20, 1 << 27
_QUERIES = 256  # of a mask, looked at at a time
_LAST = threading.local()


def document_lengths(mask: Tensor, heads_size: int) -> list[list[int]] | None:
    """Return the lengths of each row's documents, if a mask hides all but a token's own document up to itself. All
    layers of a stage ask with one mask, which is looked at once (a GPU is waited for once).

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
    call = _CALL if mask.device.type == "cpu" else _CALL_ELSEWHERE
    most = mask.shape[2] ** 2 * heads_size // call  # documents a row
    if most < 2:
        return None
    last = getattr(_LAST, "value", None)
    seen = version(mask), most
    if last is None or last[0]() is not mask or last[1] != seen:
        last = _LAST.value = (weakref.ref(mask), seen, _lengths(mask, most))
    lengths: list[list[int]] | None = last[2]
    return lengths


def _lengths(mask: Tensor, most: int) -> list[list[int]] | None:
    tokens = mask.shape[2]
    places = torch.arange(tokens, device=mask.device)
    begins = mask.new_ones(len(mask), tokens)
    begins[:, 1:] = ~mask[:, 0].diagonal(-1, 1, 2)  # who does not see the token before
    own = torch.where(begins, places, 0).cummax(1).values  # the place where its document begins
    blocks = (mask[:, 0].split(_QUERIES, 1), own[..., None].split(_QUERIES, 1), places[:, None].split(_QUERIES))
    same = [(part == ((places >= low) & (places <= high))).all() for part, low, high in zip(*blocks, strict=True)]
    good, *flags = torch.cat([torch.stack(same).all()[None], begins.flatten()]).tolist()  # one transfer
    rows = [[at for at in range(tokens) if flags[row * tokens + at]] for row in range(len(mask))]
    if not good or max(map(len, rows)) > most:
        return None
    return [[end - begin for begin, end in itertools.pairwise([*row, tokens])] for row in rows]


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
