"""Arguments of the trainer that are objects of a kind: refused by name where they are not."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch

from spu.plan import Plan
from spu.precision import LossScaler

__all__ = ["check_arguments"]


def check_arguments(
    optimizer: Any, lr: Any, plan: Any, scaler: Any, *, loss_fn: Any, lr_schedule: Any, report: Any
) -> None:
    """Raise TypeError for an argument of another kind than the trainer takes; None is one of each."""
    if isinstance(optimizer, torch.optim.Optimizer):
        name = type(optimizer).__name__
        raise TypeError(
            f"optimizer is an {name} that was made already; the trainer makes one for each stage: give its class, "
            f"optimizer={name}, lr=..., or functools.partial({name}, lr=..., ...)"
        )
    callables = {
        "optimizer": (optimizer, "an optimizer's class, or a function from parameters to an optimizer"),
        "loss_fn": (loss_fn, "a function of outputs and targets, or a module such as nn.CrossEntropyLoss()"),
        "lr_schedule": (lr_schedule, "a function from a step's index to a factor on the learning rate"),
        "report": (report, "a function of text, such as print"),
    }
    for name, (value, wanted) in callables.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} is {value!r}: give {wanted}")
    if lr is not None and not isinstance(lr, (Real, torch.Tensor)):
        raise TypeError(f"lr is {lr!r}: give a number")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan is {plan!r}: give a Plan, such as Plan.from_json(text) or another trainer's plan")
    if scaler is not None and not isinstance(scaler, LossScaler):
        raise TypeError(
            f"scaler is a {type(scaler).__name__}: give a spu.LossScaler, which stages in threads can share"
        )
