"""The next batch is made before the last step's result is read: a card is at work until then."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from spu.train import loop
from spu.train.batches import Batches
from spu.train.config import TrainConfig
from spu.train.guard import Guard


def test_a_batch_is_made_once_and_the_one_that_is_asked_for():
    made = []
    batches = Batches(lambda index, batch, seq: made.append((index, batch, seq)) or (index, index), 2, 8)
    batches.make(1)
    assert batches.take(1) == (1, 1)
    batches.make(2)
    assert batches.take(5) == (5, 5)
    assert batches.take(2) == (2, 2)
    assert made == [(1, 2, 8), (2, 2, 8), (5, 2, 8), (2, 2, 8)]


def test_a_batch_that_fails_does_so_when_its_step_comes():
    def of(index, batch, seq):
        raise OSError(f"batch {index}")

    batches = Batches(of, 2, 8)
    batches.make(1)
    with pytest.raises(OSError, match="batch 1"):
        batches.take(1)


class Result:
    """A step's result on a card: whatever is read of it waits."""

    def __init__(self, events: list[str], step: int) -> None:
        self._events, self._step = events, step

    def __getattr__(self, name: str):
        self._events.append(f"read {self._step}")
        return {"skipped": False}.get(name, 1.0)


def test_the_next_batch_is_made_while_a_card_works(tmp_path: Path) -> None:
    events: list[str] = []

    def batch(seed, step, rows, seq):
        events.append(f"make {step}")
        return step, torch.zeros(rows, seq, dtype=torch.long)

    def step(inputs, targets):
        events.append(f"step {inputs}")
        return Result(events, inputs)

    def timeline():
        events.append("read")

    class Steps(loop.Loop):
        def __init__(self) -> None:
            config = TrainConfig(steps=3, batch=2, seq=8, microbatches=1)
            self.trainer = SimpleNamespace(step=step, plan=None, timeline=timeline)
            self.job = SimpleNamespace(config=config, folder=tmp_path)
            self._batches = Batches(lambda *how: batch(0, *how), 2, 4)
            self.steps, self._plan, self.timelines, self._tokens, self._skipped = 3, None, [], 0, 0
            self._metrics, self._guard = SimpleNamespace(append=lambda **row: None), Guard()

    steps = Steps()
    for number in (1, 2, 3):
        steps._train(number)
    assert [event for event in events if not event.startswith("read")] == [
        "make 0", "step 0", "make 1", "step 1", "make 2", "step 2",
    ]  # fmt: skip
    assert {("step 0", "make 1"), ("step 1", "make 2")} <= set(pairwise(events)), "something was read between"
    assert "read 2" in events
