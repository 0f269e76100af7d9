"""How a run begins: its steps are timed, its folder is locked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from spu.train import loop as run
from spu.train.config import TrainConfig
from spu.train.loop import settle_steps


def test_a_runs_steps_are_timed_without_keeping_a_batchs_outputs():
    asked = []

    def forward_backward(*batch, **how):
        asked.append(how)
        return torch.tensor(1.0), None

    trainer = SimpleNamespace(forward_backward=forward_backward)
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
    monkeypatch.setattr(run, "make_trained_model", lambda *_, **__: nn.Linear(1, 1))
    monkeypatch.setattr(run, "make_trainer", lambda *_: Trainer())
    with pytest.raises(KeyboardInterrupt):
        run.train(SimpleNamespace(config=TrainConfig(), new=False, folder=folder), None)
    assert events == ["lock", "load"]
