"""Ctrl-C during an update: the update is done, and counted, before it is raised."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch
from torch import nn

from spu import ModelParallelTrainer
from spu.engine.uninterrupted import uninterrupted
from spu.optim.adamw import AdamW


class Slow(AdamW):
    """Ctrl-C arrives while it works."""

    pressed = False

    def step(self, *args, **kwargs):
        if not Slow.pressed:
            Slow.pressed = True
            signal.raise_signal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else (
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            )
            time.sleep(0.1)
        return super().step(*args, **kwargs)


@pytest.fixture
def ctrl_c() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_update_that_ctrl_c_falls_into_is_whole(ctrl_c: None) -> None:
    """Half of the stages were a step ahead, the step was not counted, and gradients were left."""
    Slow.pressed = False
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(2)]
    before = [p.detach().clone() for layer in layers for p in layer.parameters()]
    x, y = torch.randn(4, 4), torch.zeros(4, dtype=torch.long)
    with ModelParallelTrainer(
        layers, ["cpu:0", "cpu:1"], precision="fp32", microbatches=2, optimizer=Slow, lr=0.1
    ) as trainer:
        with pytest.raises(KeyboardInterrupt):
            trainer.step(x, y)
        assert Slow.pressed
        assert trainer.steps_done == 1
        assert all(p.grad is None for p in trainer.parameters())
        assert all(not torch.equal(p, old) for p, old in zip(trainer.parameters(), before, strict=True))
        trainer.step(x, y)
        assert trainer.steps_done == 2


def test_an_update_that_fails_half_way_asks_for_a_checkpoint(tmp_path) -> None:
    class Fails(AdamW):
        def step(self, *args, **kwargs):
            if armed and threading.current_thread().name.startswith("spu cpu:1"):
                raise ArithmeticError("no memory for moments")
            return super().step(*args, **kwargs)

    armed: list[int] = []
    x, y = torch.randn(4, 4), torch.zeros(4, dtype=torch.long)
    with ModelParallelTrainer(
        [nn.Linear(4, 4), nn.Linear(4, 4)], ["cpu:0", "cpu:1"], microbatches=2, optimizer=Fails, lr=0.1
    ) as trainer:
        trainer.step(x, y)
        trainer.save(tmp_path / "checkpoint")
        armed.append(1)
        with pytest.raises(RuntimeError, match="no memory for moments"):
            trainer.step(x, y)
        armed.clear()
        assert all(p.grad is None for p in trainer.parameters())
        with pytest.raises(RuntimeError, match="an update failed half-way .*: load a checkpoint"):
            trainer.step(x, y)
        trainer.load(tmp_path / "checkpoint")
        trainer.step(x, y)
        assert trainer.steps_done == 2


def test_a_task_keeps_its_context_and_hands_its_error_on() -> None:
    def fails() -> None:
        raise ArithmeticError("its own")

    with pytest.raises(ArithmeticError, match="its own"):
        uninterrupted(fails)
    assert not any(thread.name == "spu update" for thread in threading.enumerate())
