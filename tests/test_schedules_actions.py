"""Actions and how a schedule is printed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spu.schedules import Action, ScheduleError, format_grid, parse_grid, peak_in_flight, peak_on_ranks, ranks_of


@given(st.integers(0, 10**6), st.sampled_from("FBIW"), st.integers(0, 10**6))
@settings(max_examples=50)
def test_an_action_prints_and_parses(stage, kind, microbatch):
    action = Action(stage, kind, microbatch)
    assert str(action) == f"{stage}{kind}{microbatch}"
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "2F", "2X0", "2f0", "-1F0", "2F0 3F0", "2.0F1"])
def test_a_text_that_is_no_action_is_refused_by_name(text):
    with pytest.raises(ValueError, match=r"is not an action.*'2F0'") as error:
        Action.parse(text)
    assert repr(text) in str(error.value)


def test_the_grid_has_a_column_per_rank_and_a_line_per_position():
    grid = format_grid(parse_grid("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1"))
    assert grid == (
        "  rank 0 rank 1\n"
        "0  0F0    1F0\n"
        "1  0F1    1B0\n"
        "2  0B0    1F1\n"
        "3  0B1    1B1"
    )  # fmt: skip


def test_the_grid_marks_an_action_and_a_missing_one():
    rows = parse_grid("0F0 0B0\n1F0")
    assert format_grid(rows, mark=(0, 1), note="why").splitlines()[2] == "1 [0B0]  <-- ERROR HERE: why"
    assert format_grid(rows, mark=(1, 1)).splitlines()[2] == "1  0B0   []  <-- ERROR HERE"


def test_peak_in_flight_counts_until_the_last_action_of_a_microbatch():
    assert peak_in_flight(parse_grid("0F0 0F1 0B0 0F2 0B1 0B2")) == [2]
    assert peak_in_flight(parse_grid("0F0 0I0 0F1 0I1 0W0 0W1")) == [2]  # a deferred W keeps its microbatch
    assert peak_in_flight(parse_grid("0F0 0F1 0F2")) == [1]  # no backward: let go at once
    assert peak_in_flight([[]]) == [0]


def test_peaks_of_ranks_with_several_stages():
    rows = parse_grid("0F0 0F1 2F0 2B0 2F1 2B1 0B0 0B1\n1F0 1F1 1B0 1B1")
    assert peak_in_flight(rows) == [2, 2, 1]
    assert peak_on_ranks(rows) == [3, 2]
    assert peak_on_ranks(rows, [10, 1, 100]) == [120, 2]
    assert peak_on_ranks([[], []]) == [0, 0]


def test_the_rank_of_a_stage_is_where_its_actions_are():
    assert ranks_of(parse_grid("0F0 3F0\n1F0 2F0")) == [0, 1, 1, 0]
    assert ranks_of([[], [], []]) == [0, 1, 2]
    with pytest.raises(ScheduleError, match="stage 0 is on rank 0, but 0B0 is in the list of rank 1"):
        ranks_of(parse_grid("0F0\n0B0"))
