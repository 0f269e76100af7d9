"""Timelines, measured and predicted."""

from __future__ import annotations

import json

import pytest

from spu.schedules import Span, Timeline, one_f_one_b, simulate


def measured():
    """Two stages, given out of order, on a clock that does not start at 0."""
    return Timeline.from_spans(
        [(1, "F", 0, 12.0, 13.0), (0, "F", 0, 10.0, 12.0), (1, "B", 0, 13.0, 15.0), (0, "B", 0, 16.0, 20.0)]
    )


def test_spans_are_ordered_and_summed():
    timeline = measured()
    assert [span[:3] for span in timeline.spans] == [(0, "F", 0), (0, "B", 0), (1, "F", 0), (1, "B", 0)]
    assert (timeline.start, timeline.end, timeline.makespan) == (10.0, 20.0, 10.0)
    assert timeline.busy == [6.0, 3.0]
    assert timeline.idle_share == pytest.approx(1 - 9 / 20)
    assert timeline.peak_in_flight == [1, 1]
    assert timeline.of(1) == [Span(1, "F", 0, 12.0, 13.0), Span(1, "B", 0, 13.0, 15.0)]
    assert timeline.of(1)[1].seconds == 2.0


def test_a_stage_that_did_nothing_counts_as_idle():
    timeline = Timeline.from_spans([(0, "F", 0, 0.0, 1.0)], stages=2)
    assert (timeline.stages, timeline.busy, timeline.idle_share) == (2, [1.0, 0.0], 0.5)


def test_shifted_starts_at_zero():
    moved = measured().shifted()
    assert (moved.start, moved.end, moved.busy) == (0.0, 10.0, [6.0, 3.0])


def test_mean_durations_give_the_simulator_its_bound():
    timeline = simulate(one_f_one_b(3, 5), [(1.0, 2.0), (2.0, 3.0), (1.5, 2.5)], 0.25)
    assert timeline.mean_durations() == {
        (0, "F"): 1.0, (0, "B"): 2.0, (1, "F"): 2.0, (1, "B"): 3.0, (2, "F"): 1.5, (2, "B"): 2.5,
    }  # fmt: skip
    assert simulate(one_f_one_b(3, 5), timeline.mean_durations(), 0.25) == timeline


def test_json_round_trip():
    timeline = measured()
    assert Timeline.from_dict(json.loads(json.dumps(timeline.to_dict()))) == timeline


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ([(0, "F", 0, 0.0, 2.0), (0, "F", 1, 1.0, 3.0)], "overlap: a rank does one action at a time"),
        ([(0, "F", 0, 2.0, 1.0)], "is no span"),
        ([(-1, "F", 0, 0.0, 1.0)], "is no span"),
        ([(0, "F", 0, 0.0, float("nan"))], "is no span"),
    ],
)
def test_impossible_spans_are_refused(spans, reason):
    with pytest.raises(ValueError, match=reason):
        Timeline.from_spans(spans)


def test_an_empty_timeline():
    timeline = Timeline.from_spans([])
    assert (timeline.makespan, timeline.idle_share, timeline.busy, timeline.peak_in_flight) == (0.0, 0.0, [], [])


def test_ranks_with_several_stages():
    """Busy and idle are those of ranks; only spans of one rank must not overlap."""
    timeline = Timeline.from_spans(
        [(0, "F", 0, 0.0, 1.0), (1, "F", 0, 1.0, 2.0), (2, "F", 0, 2.0, 5.0)], 3, ranks=[0, 1, 0]
    )
    assert (timeline.rank_count, timeline.busy, timeline.makespan) == (2, [4.0, 1.0], 5.0)
    assert timeline.idle_share == pytest.approx(0.5)
    assert [span.stage for span in timeline.of_rank(0)] == [0, 2]
    assert Timeline.from_dict(json.loads(json.dumps(timeline.to_dict()))) == timeline
    assert timeline.shifted().ranks == (0, 1, 0)
    with pytest.raises(ValueError, match="overlap: a rank does one action at a time"):
        Timeline.from_spans([(0, "F", 0, 0.0, 2.0), (1, "F", 0, 1.0, 3.0)], ranks=[0, 0])
    with pytest.raises(ValueError, match="there are 3 stages, but ranks has 2 entries"):
        Timeline.from_spans([(2, "F", 0, 0.0, 2.0)], ranks=[0, 1])


def test_a_file_without_ranks_is_read_as_one_stage_each():
    old = {"stages": 2, "spans": [[0, "F", 0, 0.0, 1.0]]}
    assert Timeline.from_dict(old).ranks == (0, 1)
