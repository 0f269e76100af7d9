"""How a run begins: its steps are timed, its folder is locked."""

from __future__ import annotations

import signal
from pathlib import Path
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


def test_a_signal_between_the_save_and_the_end_of_a_step_is_the_next_steps(tmp_path: Path) -> None:
    """It was told as "saved" after a step that had seen no reason to save."""
    saved, stopped = [], []

    class Late:
        reads = 0

        @property
        def asked(self):
            self.reads += 1
            return signal.SIGINT if self.reads > 1 else None  # it comes when the step has looked once

    class Steps(run.Loop):
        def __init__(self):
            self.job = SimpleNamespace(folder=tmp_path, config=TrainConfig(steps=2, eval_every=9), view=None)
            self.done, self.steps, self._skipped, self._tokens_per_s, self._val_loss = 0, 2, 0, 1.0, None
            self._shown, self._patience = SimpleNamespace(add=lambda loss: loss), SimpleNamespace(spent=False)
            self._guard = SimpleNamespace(sound=True)

        def _train(self, step):
            return SimpleNamespace(loss=1.0, loss_scale=1.0)

        def _validate(self, step):
            return None

        def _save_if_due(self, step, best, *, last, stop):
            saved.append(stop or last)

        def _stop(self, step, signum):
            stopped.append(step)

    Steps().run(Late())
    assert (saved, stopped) == ([False, True], [])
