"""For tests of streamed stages: a small model, a store that is as late as it may be, a trainer and what it has seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from spu import ModelParallelTrainer
from spu.engine import runner
from spu.engine.tiers import stream
from spu.memory.store import Region, StoreError
from spu.plan import Plan

LAYERS = 6
PLANS: dict[str, Plan] = {}  # planning takes longer than the training here


class Done:
    """A ticket whose work is done when it is waited for, as late as a store may do it."""

    def __init__(self, task: Callable[[], Any]) -> None:
        self.task: Callable[[], Any] | None = task

    def wait(self) -> None:
        task, self.task = self.task, None
        if task is not None:
            task()


class Lazy:
    """A store that reads and writes when it is waited for; slots that are used too early hold other bytes."""

    def __init__(self) -> None:
        self.regions: list[torch.Tensor] = []
        self.read_bytes = self.written_bytes = 0
        self.fails_after: int | None = None
        self.closed = False

    def allocate(self, names: Sequence[str], sizes: Sequence[int]) -> list[Region]:
        assert not self.regions
        assert all(size % 4096 == 0 for size in sizes)
        assert len(set(names)) == len(names)
        self.regions = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        return list(range(len(sizes)))

    def read(self, region: Region, into: torch.Tensor) -> Done:
        self.read_bytes += into.numel()
        into.fill_(0xFF)  # NaN, in every floating-point dtype
        return Done(lambda: self._copy(into, self.regions[region][: into.numel()]))

    def write(self, region: Region, data: torch.Tensor) -> Done:
        self.written_bytes += data.numel()
        return Done(lambda: self._copy(self.regions[region][: data.numel()], data))

    def _copy(self, into: torch.Tensor, data: torch.Tensor) -> None:
        if self.fails_after is not None:
            self.fails_after -= 1
            if self.fails_after < 0:
                raise StoreError("the disk has failed")
        into.copy_(data)

    def home(self, region: Region) -> torch.Tensor:
        return self.regions[region]

    def exposed(self, regions: Sequence[Region]) -> None: ...

    def hidden(self, regions: Sequence[Region]) -> None: ...

    def close(self) -> None:
        self.closed = True


class Tied(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()


def model(tied: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Embedding(11, 16),
        nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)),
        nn.LayerNorm(16),
        nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1), nn.BatchNorm1d(5)),
        nn.Linear(16, 16, bias=False),
    ]
    layers[4].weight.requires_grad_(False)
    head = Tied(layers[0].weight) if tied else nn.Linear(16, 11)
    return nn.Sequential(*layers, head)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 11, (8, 5), generator=generator) for _ in range(2 * count)]
    return list(zip(ids[::2], ids[1::2], strict=True))


def make(
    monkeypatch: pytest.MonkeyPatch, own: nn.Module, store: Any, residency: Any = "streamed", **settings: Any
) -> ModelParallelTrainer:
    """Return a trainer with a stage for each layer, streamed over ``store`` if there is one."""
    how = {"slots": settings.pop("slots", 2), "buffers": settings.pop("buffers", 2)}
    how["streams"] = settings.pop("streams", None)
    how["grads"] = settings.pop("grads", torch.float32)
    original = runner.Runner.__init__

    def init(self: Any, built: Any, plan: Any, *args: Any, **keywords: Any) -> None:
        if store is not None:
            each = [residency] * len(built.stages) if isinstance(residency, str) else residency
            keywords["make_streaming"] = partial(
                stream, residencies=each, stores=store if isinstance(store, list) else [store], **how
            )
        original(self, built, plan, *args, **keywords)

    monkeypatch.setattr(runner.Runner, "__init__", init)
    defaults = {"devices": "cpu:0", "schedule": "layer_outer", "virtual": LAYERS, "microbatches": 4, "lr": 1e-2}
    settings = defaults | settings
    key = repr(sorted(settings.items(), key=str)) + repr(own)
    trainer = ModelParallelTrainer(own, plan=PLANS.get(key), **settings)
    x, y = batches(1)[0]
    PLANS[key] = trainer.prepare(x, y)
    monkeypatch.setattr(runner.Runner, "__init__", original)
    return trainer


def trained(trainer: ModelParallelTrainer, own: nn.Module) -> list[Any]:
    """Train, evaluate, change a weight, train on, and return everything that was seen."""
    seen: list[Any] = []
    for index, (x, y) in enumerate(batches(5)):
        result = trainer.step(x, y)
        seen += [torch.tensor(result.loss), torch.tensor(result.grad_norm)]
        if index == 2:
            seen.append(torch.tensor(trainer.evaluate(x, y)))
        if index == 3:
            trainer.flush()
            with torch.no_grad():
                own.get_parameter("1.0.weight").mul_(0.9)
    seen += trainer.state_dict_for_model().values()
    x, y = batches(1)[0]
    loss, outputs = trainer.forward_backward(x, y)
    seen += [loss, outputs, *(p.grad.clone() for p in own.parameters() if p.grad is not None)]
    trainer.close()
    return [*seen, *(p.detach().clone() for p in own.parameters())]


MIXED = ["streamed", "offloaded", "resident", "streamed", "streamed", "streamed"]
MIXED_TIE = ["resident", "streamed", "streamed", "offloaded", "streamed", "streamed"]
