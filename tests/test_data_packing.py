"""Rows of documents: every token is learnt once, no row overflows, and what is masked is left out."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spu.data import packing
from spu.data.packing import best_fit, cut_pieces, packed_rows


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 17), max_size=80))
def test_best_fit_places_every_piece_once_within_its_row(lengths: list[int]) -> None:
    rows = best_fit(np.array(lengths, dtype=np.int64), 17)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    used = [sum(lengths[piece] for piece in row) for row in rows]
    assert all(0 < total <= 17 for total in used)
    assert sum(1 for total in used if 2 * total <= 17) <= 1, "two rows that are half empty would have been one"


def test_best_fit_leaves_the_least_room() -> None:
    assert best_fit(np.array([6, 5, 4, 3, 2]), 10) == [[0, 2], [1, 3, 4]]
    assert best_fit(np.array([10, 1, 10]), 10) == [[0], [2], [1]]


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=25),
    seq=st.integers(1, 12),
    together=st.integers(1, 200),
    masked=st.booleans(),
    partly=st.booleans(),
    pack=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_target_is_learnt_exactly_once(
    sizes: list[int], seq: int, together: int, masked: bool, partly: bool, pack: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    ends = np.cumsum(np.array(sizes, dtype=np.int64))
    trained = random.integers(0, 2, ends[-1]).astype(np.uint8) if masked else None
    chosen = random.integers(0, 2, len(ends)).astype(bool) if partly else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_TOGETHER", together)
        rows = list(packed_rows(ends, trained, chosen, seq, pack=pack))
    seen = np.zeros(ends[-1], dtype=int)
    begins = np.concatenate(([0], ends[:-1]))
    for starts, lengths, counts in rows:
        assert counts.sum() == len(starts)
        assert pack or (counts == 1).all()
        for total in np.add.reduceat(lengths, np.cumsum(counts) - counts) if len(counts) else ():
            assert total <= seq
        for start, length in zip(starts, lengths, strict=True):
            document = np.searchsorted(ends, start, side="right")
            assert start + length < ends[document], "a piece's last target is of the same document"
            seen[start + 1 : start + length + 1] += 1
    wanted = np.ones(ends[-1], dtype=int)
    wanted[begins] = 0
    for document, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        if chosen is not None and not chosen[document]:
            wanted[begin:end] = 0
    assert seen.max(initial=0) <= 1
    learnt = np.ones(ends[-1], dtype=bool) if trained is None else trained == 1
    assert (seen[learnt] == wanted[learnt]).all()


def test_pieces_without_a_trained_target_are_left_out() -> None:
    trained = np.array([1, 0, 0, 0, 0, 1, 0, 0, 1], dtype=np.uint8)  # documents of 6 and 3 tokens
    ((starts, lengths),) = cut_pieces(np.array([6, 9]), trained, None, 2)
    assert list(zip(starts, lengths, strict=True)) == [(4, 1), (6, 2)]


def test_which_pieces_are_learnt_takes_no_memory_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took 8 bytes for every token of the corpus: 0.8 GB for 100 MB of chats."""
    monkeypatch.setattr(packing, "_TOGETHER", 1 << 16)
    ends = np.arange(1000, 2_000_001, 1000)
    trained = np.zeros(2_000_000, dtype=np.uint8)
    trained[np.arange(0, 2_000_000, 2000) + 700] = 1  # one in the second half of every other document
    tracemalloc.start()
    try:
        found = [starts for starts, _ in cut_pieces(ends, trained, None, 500)]
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert np.array_equal(np.concatenate(found), np.arange(0, 2_000_000, 2000) + 500)
