"""Documents in rows of a fixed length: cut where they are longer, packed where they are shorter.

A *piece* is up to ``seq`` consecutive inputs of one document; their targets are the tokens after them, so the last
token of a document is no input and its first is no target. Every other token is a target in one piece. Pieces without
a trained target are left out.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["best_fit", "cut_pieces", "packed_rows"]

_TOGETHER = 1 << 22  # tokens whose pieces are packed among themselves: bounds memory, and costs a part of a row

Ints = np.ndarray[Any, Any]


def cut_pieces(ends: Ints, trained: Ints | None, chosen: Ints | None, seq: int) -> Iterator[tuple[Ints, Ints]]:
    """Yield the pieces of documents, some documents at a time.

    Args:
        ends: int64 [documents], where each document's tokens end; the next one's begin there.
        trained: uint8 [tokens], 1 for tokens that are learnt; None for all.
        chosen: bool [documents], which are taken; None for all.
        seq: the longest piece.

    Yields:
        (first token, number of inputs), int64 [pieces] each, in the documents' order.
    """
    first, count = 0, len(ends)
    while first < count:
        start = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, start + _TOGETHER, side="right")))
        stops = np.array(ends[first:last])
        begins = np.concatenate((np.array([start]), stops[:-1]))
        if chosen is not None:
            begins, stops = begins[chosen[first:last]], stops[chosen[first:last]]
        inputs = np.maximum(stops - begins - 1, 0)
        parts = -(-inputs // seq)
        document = np.repeat(np.arange(len(parts)), parts)
        part = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
        starts, lengths = begins[document] + part * seq, np.minimum(seq, inputs[document] - part * seq)
        if trained is not None and len(starts):
            learnt = _largest(trained, starts + 1, starts + 1 + lengths) > 0
            starts, lengths = starts[learnt], lengths[learnt]
        yield starts, lengths
        first = last


def _largest(values: Ints, begins: Ints, ends: Ints) -> Ints:
    """Return the largest of ``values`` in each range; ranges are in order and not empty.

    Nothing outside them is read, or copied: a sum in int64 would make 8 bytes of each value.
    """
    bounds = np.stack((begins, ends), axis=1).reshape(-1)
    first, last = int(bounds[0]), int(bounds[-1])
    found: Ints = np.maximum.reduceat(values[first:last], bounds[:-1] - first)[::2]
    return found


def best_fit(lengths: Ints, seq: int) -> list[list[int]]:
    """Return rows of pieces: each piece, the longest first, goes where it leaves the least room (Johnson, 1973).

    Args:
        lengths: int64 [pieces], from 1 to ``seq``.
        seq: room of a row.

    Returns:
        The pieces' places in ``lengths`` by row.
    """
    order = np.argsort(-lengths, kind="stable")
    full = int(np.count_nonzero(lengths == seq))
    rows = [[piece] for piece in order[:full].tolist()]
    by_room: dict[int, list[int]] = {}  # room that is left -> rows
    rooms: list[int] = []  # the keys, sorted
    for piece, length in zip(order[full:].tolist(), lengths[order[full:]].tolist(), strict=True):
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
            rows[row].append(piece)
        else:
            room, row = seq, len(rows)
            rows.append([piece])
        if room > length:
            if room - length not in by_room:
                by_room[room - length] = []
                insort(rooms, room - length)
            by_room[room - length].append(row)
    return rows


def packed_rows(
    ends: Ints, trained: Ints | None, chosen: Ints | None, seq: int, *, pack: bool
) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Yield rows of up to ``seq`` inputs, some at a time; arguments as for ``cut_pieces``.

    Args:
        pack: put several pieces in a row, else one.

    Yields:
        (first token of each piece, its inputs, the number of pieces of each row), int64; pieces in the rows' order.
    """
    for starts, lengths in cut_pieces(ends, trained, chosen, seq):
        if not pack:
            yield starts, lengths, np.ones(len(starts), dtype=np.int64)
            continue
        rows = best_fit(lengths, seq)
        order = np.array([piece for row in rows for piece in row], dtype=np.int64)
        yield starts[order], lengths[order], np.array([len(row) for row in rows], dtype=np.int64)
