"""What ends a run that cannot get anywhere."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from torch import nn

pytest.importorskip("transformers")

from spu.train import loop as run
from spu.train.config import TrainConfig
from spu.train.guard import MAX_BAD_LOSSES, MAX_SKIPPED, Guard
from spu.train.loop import settle_steps


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


def test_a_runs_steps_are_timed_without_keeping_a_batchs_outputs():
    asked = []
    trainer = SimpleNamespace(forward_backward=lambda *batch, **how: asked.append(how))
    job = SimpleNamespace(config=TrainConfig(minutes=1.0), corpus=SimpleNamespace(batch=lambda *_: (1, 2)))
    settle_steps(job, trainer)
    assert job.config.planned_steps() >= 1
    assert asked == [{"keep_outputs": False}] * 4


def test_a_run_is_locked_before_its_checkpoint_is_read(monkeypatch):
    events = []

    class Trainer(SimpleNamespace):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def load(self, path):
            events.append("load")
            raise KeyboardInterrupt

    folder = SimpleNamespace(lock=lambda: events.append("lock"), checkpoint=SimpleNamespace(exists=lambda: True))
    monkeypatch.setattr(run, "make_model", lambda *_: nn.Linear(1, 1))
    monkeypatch.setattr(run, "make_trainer", lambda *_: Trainer())
    with pytest.raises(KeyboardInterrupt):
        run.train(SimpleNamespace(config=TrainConfig(), new=False, folder=folder), None)
    assert events == ["lock", "load"]


def test_skipping_for_ever_ends_the_run():
    guard = Guard()
    for step in range(MAX_SKIPPED - 1):
        guard.check(step, result(skipped=True), TrainConfig())
    with pytest.raises(ValueError, match=r"40 steps in a row were skipped, down to a loss scale of 2"):
        guard.check(40, result(skipped=True), TrainConfig())
