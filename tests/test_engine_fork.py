"""A process forked while a trainer lives: worker threads are not in it, and waiting for them would take for ever."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from spu import ModelParallelTrainer

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]
X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4


def make(devices: Any = ("cpu:0", "cpu:1"), **settings: Any) -> ModelParallelTrainer:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)]
    return ModelParallelTrainer(layers, devices, **{"precision": "fp32", "microbatches": 2, "lr": 0.01, **settings})


def in_child(task: Callable[[], Any], seconds: float = 60) -> Any:
    """What `task` returns, or the text of what it raises, in a forked process that is ended if it hangs."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def body() -> None:
        try:
            there.send(task())
        except Exception as error:
            there.send(f"{type(error).__name__}: {error}")

    child = context.Process(target=body)
    child.start()
    try:
        assert here.poll(seconds), "the forked process hangs"
        return here.recv()
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize(
    ("devices", "settings"),
    [
        (("cpu:0", "cpu:1"), {}),
        (("cpu",), {}),
        (("cpu:0", "cpu:1"), {"precision": "fp16", "schedule": "zb", "transfer": "int8"}),
    ],
    ids=["two stages", "one stage", "fp16, packed"],
)
def test_a_forked_child_evaluates_and_steps_as_its_parent_does(devices: Any, settings: dict[str, Any]) -> None:
    """The child waited for ever for threads that only its parent has."""
    with make(devices, **settings) as trainer:
        trainer.step(X, Y)
        found = in_child(lambda: (trainer.evaluate(X, Y), float(trainer.step(X, Y).loss), trainer.steps_done))
        assert trainer.steps_done == 1
        assert found == (trainer.evaluate(X, Y), float(trainer.step(X, Y).loss), 2)


def test_a_forked_child_saves_closes_and_ends(tmp_path) -> None:
    with make() as trainer:
        trainer.step(X, Y)

        def task() -> str:
            trainer.save(tmp_path / "checkpoint")
            trainer.close()
            return "closed"

        assert in_child(task) == "closed"
        trainer.step(X, Y)
        trainer.load(tmp_path / "checkpoint")
        assert trainer.steps_done == 1


def test_a_child_forked_in_the_midst_of_a_step_says_so() -> None:
    reached, go_on = threading.Event(), threading.Event()

    class Waits(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if armed:
                reached.set()
                go_on.wait(60)
            return super().forward(x)

    armed: list[int] = []
    layers = [Waits(6, 16), nn.Linear(16, 4)]
    with ModelParallelTrainer(layers, ["cpu:0", "cpu:1"], precision="fp32", microbatches=2) as trainer:
        trainer.step(X, Y)
        armed.append(1)
        stepping = threading.Thread(target=trainer.step, args=(X, Y))
        stepping.start()
        try:
            assert reached.wait(60)
            said = in_child(lambda: trainer.evaluate(X, Y))
            assert said.startswith("RuntimeError: this process was forked while the trainer was at work")
            assert in_child(trainer.close) is None
        finally:
            go_on.set()
            stepping.join()


class Rows(Dataset):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return X[index], Y[index]


def test_data_loader_workers_are_forked_while_a_trainer_lives() -> None:
    with make() as trainer, make() as plain:
        trainer.step(X, Y)
        plain.step(X, Y)
        for _ in range(2):
            for x, y in DataLoader(Rows(), batch_size=8, num_workers=2, multiprocessing_context="fork"):
                assert float(trainer.step(x, y).loss) == float(plain.step(X, Y).loss)
