"""The fuzzer's menu of losses, each with its own denominator: what a microbatch counts of the whole batch's mean."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CLASSES", "LOSSES", "Loss"]

CLASSES = 4
_WEIGHT = (1.0, 7.0, 0.2, 3.0)


@dataclass(frozen=True)
class Loss:
    """A loss and how its batch mean is made of its microbatches.

    Attributes:
        make: the loss_fn of trainer and plain run; None: the trainer's own.
        targets: ``targets(random generator, rows, sequence lengths)``.
        counts: how much a microbatch's value weighs; "sum" losses have every value weigh 1.
        sums: the batch's loss is the sum of its microbatches'.
        settings: further arguments of the trainer.
        may_refuse: the trainer cannot see the denominator: an error is as right as the right value.
        long: works on [rows, LENGTH, CLASSES].
    """

    make: Callable[[], Callable[[Any, Any], Tensor] | None]
    targets: Callable[[torch.Generator, tuple[int, ...]], Tensor]
    counts: Callable[[Tensor], Tensor]
    sums: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    may_refuse: bool = False
    long: bool = False


def _ids(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(CLASSES, shape, generator=generator)


def _masked(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Some rows do not count; the first microbatches may have none that do."""
    ids = _ids(generator, shape)
    ids[torch.rand(shape, generator=generator) < 0.4] = -100
    ids.view(-1)[-1] = 1
    return ids


def _floats(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(*shape, CLASSES, generator=generator)


def _chances(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return _floats(generator, shape).softmax(-1)


def _counted(targets: Tensor) -> Tensor:
    return (targets != -100).sum().double()


def _elements(targets: Tensor) -> Tensor:
    return torch.tensor(float(targets.numel()), dtype=torch.float64)


def _rows(targets: Tensor) -> Tensor:
    return torch.tensor(float(len(targets)), dtype=torch.float64)


def _weights(targets: Tensor) -> Tensor:
    return torch.tensor(_WEIGHT, dtype=torch.float64)[targets.clamp_min(0)].mul(targets != -100).sum()


def _weight() -> Tensor:
    return torch.tensor(_WEIGHT)


class Temperature(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.full((CLASSES,), 1.3))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float() * self.temperature, targets)


class Moving(nn.Module):
    """A loss with a state that every call changes; the state is not part of the value."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[Tensor] = []

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        self.seen = [outputs.detach()]
        return F.mse_loss(outputs, targets)


def _own(outputs: Tensor, targets: Tensor) -> Tensor:
    """Reads values."""
    chosen = targets != -100
    if not bool(chosen.any()):
        return outputs.sum() * 0.0
    return F.cross_entropy(outputs[chosen], targets[chosen])


def _hidden(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, weight=_weight().to(outputs.dtype))


LOSSES: dict[str, Loss] = {
    "default": Loss(lambda: None, _masked, _counted, long=True),
    "cross entropy": Loss(nn.CrossEntropyLoss, _masked, _counted),
    "class weights": Loss(lambda: nn.CrossEntropyLoss(weight=_weight()), _masked, _weights),
    "smoothing": Loss(lambda: nn.CrossEntropyLoss(label_smoothing=0.2), _masked, _counted),
    "weights, smoothing": Loss(lambda: nn.CrossEntropyLoss(weight=_weight(), label_smoothing=0.2), _masked, _weights),
    "soft": Loss(nn.CrossEntropyLoss, _chances, _rows),
    "sum": Loss(lambda: nn.CrossEntropyLoss(reduction="sum"), _masked, _counted, sums=True),
    "partial": Loss(lambda: functools.partial(F.cross_entropy, weight=_weight()), _masked, _weights),
    "mse": Loss(nn.MSELoss, _floats, _elements, long=True),
    "huber": Loss(lambda: F.smooth_l1_loss, _floats, _elements, long=True),
    "bce": Loss(lambda: nn.BCEWithLogitsLoss(pos_weight=_weight()), _chances, _elements),
    "divergence": Loss(
        lambda: lambda o, t: F.kl_div(o.log_softmax(-1), t, reduction="batchmean"),
        _chances,
        _rows,
        settings=(("loss_weight", len),),
    ),
    "temperature": Loss(Temperature, _masked, _counted),
    "moving": Loss(Moving, _floats, _elements, long=True),
    "own": Loss(lambda: _own, _masked, _counted),
    "hidden weights": Loss(lambda: _hidden, _ids, _weights, may_refuse=True),
    "given weights": Loss(lambda: _hidden, _ids, _weights, settings=(("loss_weight", _weights),)),
}


def draw_loss(r: random.Random, long: bool) -> str:
    return r.choice([name for name, loss in LOSSES.items() if loss.long or not long])
