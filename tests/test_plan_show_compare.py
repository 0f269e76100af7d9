"""Predicted beside measured."""

from __future__ import annotations

import dataclasses

import pytest
from test_plan_plan import PLAN

from spu.plan.show.compare import comparison
from spu.plan.show.curve import memory_curve, peak_moment


def test_time_bubble_work_and_bytes_stand_side_by_side():
    lines = comparison(PLAN, PLAN.timeline(), 2 * PLAN.predicted.step_s, {"cpu:0": 110, "cpu": 404})
    assert lines[0].split() == ["predicted", "measured"]
    assert lines[1].split()[:1] == ["step"]
    assert lines[1].endswith("+100.0%")
    assert any(line.split()[:2] == ["cpu:1", "works"] and line.endswith("+0.0%") for line in lines)
    assert any(line.split() == ["cpu:0", "peak", "100", "B", "110", "B", "+10.0%"] for line in lines)
    assert lines[-2].endswith("with Python, libraries and files")


@pytest.mark.parametrize(
    ("basis", "times", "says"),
    [
        ("measured", 1.4, ""),
        ("measured", 1 / 1.4, ""),
        ("measured", 2.0, "A step took 2 times its predicted time: other work on the devices"),
        ("measured", 0.25, "A step took 0.25 times its predicted time: other work on the devices"),
        ("estimated", 3.0, "A step took 3 times its predicted time: it rests on counted work"),
        ("nominal", 9.0, "The prediction is at made-up speeds"),
    ],
)
def test_what_is_far_from_its_prediction_is_said_with_what_to_do(basis: str, times: float, says: str) -> None:
    plan = dataclasses.replace(PLAN, predicted=dataclasses.replace(PLAN.predicted, basis=basis))
    last = comparison(plan, plan.timeline(), times * plan.predicted.step_s)[-1]
    assert last.startswith(says) if says else " works" in last
    assert ("--replan, or trainer.replan()" in last) == says.startswith("A step")  # for the command's users too


def test_memory_over_time_holds_what_is_in_flight():
    first, last = memory_curve(PLAN)
    assert first[0] == (0.0, 10 + 20 + 20 + 40 + 3 + 3 + 1)  # the first forward begins at once
    assert max(held for _, held in first) == 93 + 2 * 3 + 1  # two microbatches in flight on the first of two stages
    assert max(held for _, held in last) == 93 + 3 + 1
    assert first[-1][1] == last[-1][1] == 93
    assert peak_moment(PLAN, 0).startswith("in the forward of microbatch 1 (0F1)")
