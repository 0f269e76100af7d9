"""What ends a run that cannot get anywhere."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from spu.job.config import TrainConfig
from spu.job.run import MAX_BAD_LOSSES, MAX_SKIPPED, Guard


def result(loss: float = 1.0, skipped: bool = False):
    return SimpleNamespace(loss=loss, skipped=skipped, loss_scale=2.0)


def test_a_loss_that_is_not_finite_from_the_start_ends_the_run():
    for loss in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"from the start \(step 1\): check the weights, --lr 0.002"):
            Guard().check(1, result(loss), TrainConfig())


def test_a_bad_step_is_forgiven_but_not_many_in_a_row():
    guard = Guard()
    guard.check(1, result(), TrainConfig())
    for step in range(2, 50, 2):
        guard.check(step, result(math.nan, skipped=True), TrainConfig())
        guard.check(step + 1, result(), TrainConfig())
    for step in range(MAX_BAD_LOSSES - 1):
        guard.check(50 + step, result(math.nan, skipped=True), TrainConfig())
    with pytest.raises(ValueError, match=f"nan for {MAX_BAD_LOSSES} steps"):
        guard.check(60, result(math.nan, skipped=True), TrainConfig())


def test_skipping_for_ever_ends_the_run():
    guard = Guard()
    for step in range(MAX_SKIPPED - 1):
        guard.check(step, result(skipped=True), TrainConfig())
    with pytest.raises(ValueError, match=r"40 steps in a row were skipped, down to a loss scale of 2"):
        guard.check(40, result(skipped=True), TrainConfig())
