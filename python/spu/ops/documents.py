"""Attention of rows that hold several documents, or one and padding behind it: an op for each part of a row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from spu.ops import schema

__all__ = ["Lengths", "Part", "attention_apart", "attention_apart_backward", "parts_of"]

Lengths = Sequence[Sequence[int]]
"""Of each row's documents. They add up to the row's tokens, or a row holds one, and padding behind it."""


class Part(NamedTuple):
    """Queries of one row, and the keys that they see: each those up to itself, or all."""

    row: int
    queries: slice
    keys: slice
    causal: bool


def parts_of(lengths: Lengths, tokens: int) -> list[Part]:
    """Return the parts of rows of so many tokens: their documents, and padding, which sees the document before it."""
    found = []
    for row, own in enumerate(lengths):
        ends = [0, *itertools.accumulate(own)]
        documents = [slice(*pair) for pair in itertools.pairwise(ends)]
        found += [Part(row, document, document, True) for document in documents]
        if ends[-1] < tokens:
            found.append(Part(row, slice(ends[-1], tokens), documents[-1], False))
    return found


def attention_apart(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float, backend: str
) -> tuple[Tensor, list[Tensor]]:
    """Compute the attention of every part.

    Args:
        q, k, v: [batch, tokens, heads, head_dim], as ``attention`` takes them.

    Returns:
        (out, of the shape of ``q``; the log-sum-exp of each part's scores, fp32 [1, heads, queries])
    """
    attention, out, sums = schema.overload("attention", backend), q.new_empty(q.shape), []
    for part in parts_of(lengths, q.shape[1]):
        row, seen = slice(part.row, part.row + 1), (slice(part.row, part.row + 1), part.keys)
        out[row, part.queries], lse = attention(q[row, part.queries], k[seen], v[seen], scale, part.causal)
        sums.append(lse)
    return out, sums


def attention_apart_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Sequence[Tensor],
    lengths: Lengths,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v. Padding's keys, which nobody sees, have 0."""
    backward = schema.overload("attention_backward", backend)
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for part, lse in zip(parts_of(lengths, q.shape[1]), sums, strict=True):
        row = slice(part.row, part.row + 1)
        asked, seen = (row, part.queries), (row, part.keys)
        dq[asked], of_keys, of_values = backward(
            dout[asked], q[asked], k[seen], v[seen], out[asked], lse, scale, part.causal
        )
        dk[seen] += of_keys
        dv[seen] += of_values
    return dq, dk, dv
