"""Attention of rows that hold several documents: each document by itself, without its row's mask.

A mask has tokens x tokens values, which torch's kernel on a CPU makes into fp32 in every layer and keeps for the
backward: 64 MB a row and layer at 4,096 tokens. Documents that follow one another need none: each is causal by itself.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from spu.common.torch_private import version

__all__ = ["by_documents", "document_lengths"]

_CALL = 1 << 20  # multiply-adds that take as long as a call beside a kernel's work
_QUERIES = 256  # of a mask, looked at at a time
_LAST = threading.local()


def document_lengths(mask: Tensor, heads_size: int) -> list[list[int]] | None:
    """Return the lengths of each row's documents, if a mask hides all but a token's own document up to itself. All
    layers of a stage ask with one mask, which is looked at once.

    Args:
        mask: bool [batch, 1, tokens, tokens], True where a query (third dimension) sees a key.
        heads_size: heads x head_dim, of a query.

    Returns:
        None for any other mask (a window, padding that sees nothing), and where documents are so short that a call for
        each would take longer than the mask.
    """
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        return None
    if mask.shape[2] ** 2 * heads_size < 2 * _CALL or mask.is_inference():
        return None
    last = getattr(_LAST, "value", None)
    seen = version(mask), heads_size
    if last is None or last[0]() is not mask or last[1] != seen:
        last = _LAST.value = (weakref.ref(mask), seen, _lengths(mask, heads_size))
    lengths: list[list[int]] | None = last[2]
    return lengths


def _lengths(mask: Tensor, heads_size: int) -> list[list[int]] | None:
    found, tokens = [], mask.shape[2]
    places = torch.arange(tokens)
    for row in mask[:, 0]:
        first = torch.cat([part.to(torch.uint8).argmax(-1) for part in row.split(_QUERIES)])  # key that a query sees
        begins = (first == places).nonzero().flatten().tolist()
        lengths = [end - begin for begin, end in itertools.pairwise([*begins, tokens])]
        if sum(lengths) != tokens or len(lengths) * _CALL > tokens * tokens * heads_size:
            return None
        if not torch.equal(first, torch.repeat_interleave(torch.tensor(begins), torch.tensor(lengths))):
            return None
        blocks = (x.split(_QUERIES) for x in (row, first[:, None], places[:, None]))
        if not all(
            torch.equal(part, (places >= low) & (places <= high)) for part, low, high in zip(*blocks, strict=True)
        ):
            return None
        found.append(lengths)
    return found


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
