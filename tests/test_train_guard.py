"""What ends a run that cannot get anywhere, or gets no further."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from spu.train.config import TrainConfig
from spu.train.guard import MAX_BAD_LOSSES, MAX_SKIPPED, Guard, Patience


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


def test_a_loss_that_stays_too_high_ends_the_run():
    guard, config = Guard(), TrainConfig(max_loss=3.0, max_loss_steps=3)
    for step, loss in enumerate((3.5, 3.0, 3.5, 3.5, 2.0, 4.0, 4.0)):
        guard.check(step, result(loss), config)
    assert (guard.high, guard.sound) == (2, True)
    with pytest.raises(ValueError, match="above --max-loss 3 for 3 steps, 4.5 at step 7; what was saved"):
        guard.check(7, result(4.5), config)


def test_patience_is_with_validations_not_below_the_lowest():
    patience = Patience(3)
    for loss in (5.0, 4.0, 4.0, 4.5, 3.9, math.nan, 4.0):
        patience.add(loss)
        assert not patience.spent
    patience.add(3.9)
    assert patience.spent
    assert str(patience) == "the validation loss was not below 3.9000 in the last 3 validations"
    assert not Patience(None, [1.0] * 50).spent


def test_a_resumed_run_goes_on_counting_and_one_that_had_ended_begins_anew():
    going_on = Patience(3, [4.0, 5.0, None])
    assert (going_on.stale, going_on.lowest) == (2, 4.0)
    ended = Patience(2, [4.0, 5.0, None])
    assert (ended.stale, ended.spent, ended.lowest) == (0, False, 4.0)
