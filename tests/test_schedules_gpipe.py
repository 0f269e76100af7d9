"""The GPipe and the forward-only schedule, as literal triangles and as properties."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spu.schedules import forward_only, gpipe, parse_grid, peak_in_flight, validate


def test_gpipe_is_all_forwards_then_all_backwards_in_ascending_order():
    assert gpipe(3, 2) == parse_grid("""
        0F0 0F1 0B0 0B1
        1F0 1F1 1B0 1B1
        2F0 2F1 2B0 2B1
    """)


def test_gpipe_of_one_stage():
    assert gpipe(1, 3) == parse_grid("0F0 0F1 0F2 0B0 0B1 0B2")


def test_forward_only_is_the_forwards():
    assert forward_only(2, 3) == parse_grid("0F0 0F1 0F2\n1F0 1F1 1F2")


@given(st.integers(1, 8), st.integers(1, 16))
@settings(max_examples=60)
def test_every_f_and_b_once_valid_and_all_in_flight(stages, microbatches):
    actions = gpipe(stages, microbatches)
    everything = [(s, k, i) for s in range(stages) for k in "FB" for i in range(microbatches)]
    assert sorted(a for row in actions for a in row) == sorted(everything)
    validate(actions, stages, microbatches)
    assert peak_in_flight(actions) == [microbatches] * stages
    validate(forward_only(stages, microbatches), stages, microbatches, forward_only=True)


@pytest.mark.parametrize("make", [gpipe, forward_only])
def test_counts_must_be_positive_integers(make):
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        make(0, 4)
    with pytest.raises(ValueError, match="microbatches must be at least 1, got -2"):
        make(2, -2)
    with pytest.raises(TypeError, match=r"microbatches must be an int, got 2\.0"):
        make(2, 2.0)
