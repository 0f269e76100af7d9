"""The 1F1B schedule, as literal triangles and as properties."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spu.schedules import one_f_one_b, parse_grid, peak_in_flight, validate


def test_three_stages_four_microbatches():
    assert one_f_one_b(3, 4) == parse_grid("""
        0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3
        1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3
        2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3
    """)


def test_fewer_microbatches_than_stages():
    assert one_f_one_b(4, 2) == parse_grid("""
        0F0 0F1 0B0 0B1
        1F0 1F1 1B0 1B1
        2F0 2F1 2B0 2B1
        3F0 3B0 3F1 3B1
    """)


def test_one_stage_alternates():
    assert one_f_one_b(1, 3) == parse_grid("0F0 0B0 0F1 0B1 0F2 0B2")


@given(st.integers(1, 8), st.integers(1, 16))
@settings(max_examples=60)
def test_every_f_and_b_once_valid_and_in_flight_is_bounded(stages, microbatches):
    actions = one_f_one_b(stages, microbatches)
    everything = [(s, k, i) for s in range(stages) for k in "FB" for i in range(microbatches)]
    assert sorted(a for row in actions for a in row) == sorted(everything)
    validate(actions, stages, microbatches)
    assert peak_in_flight(actions) == [min(microbatches, stages - s) for s in range(stages)]


def test_counts_must_be_positive_integers():
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        one_f_one_b(0, 4)
    with pytest.raises(TypeError, match="ranks must be an int, got True"):
        one_f_one_b(True, 4)
