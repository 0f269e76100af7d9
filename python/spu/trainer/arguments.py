"""Arguments of the trainer that are objects of a kind: refused by name where they are not."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from numbers import Real
from typing import Any

import torch

from spu.common.torch_private import inner_of_compiled
from spu.devices.manager import Device
from spu.devices.tiers import Tiers
from spu.engine.make_optimizer import check_class
from spu.plan import Plan
from spu.precision import LossScaler

__all__ = ["check_arguments", "warn_of_emulation"]

_WITH_BF16 = (8, 0)  # compute capability


def check_arguments(
    optimizer: Any,
    lr: Any,
    plan: Any,
    scaler: Any,
    *,
    loss_fn: Any,
    lr_schedule: Any,
    report: Any,
    model: Any = None,
    tiers: Any = None,
) -> None:
    """Check arguments that are objects; None is one of each kind.

    Raises:
        TypeError: an argument of another kind than the trainer takes.
        ValueError: an optimizer, a model or a loss of the right kind that cannot be trained with.
    """
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
    for name in ("loss_fn", "lr_schedule"):
        value, wanted = callables[name]
        if isinstance(value, type) and issubclass(value, (torch.nn.Module, torch.optim.lr_scheduler.LRScheduler)):
            raise TypeError(f"{name} is the class {value.__name__}: give {wanted}")
    kind = optimizer.func if isinstance(optimizer, partial) else optimizer
    if isinstance(kind, type):
        check_class(kind)
    if model is not None:
        _check_model(model)
    if tiers is not None and not isinstance(tiers, (str, Tiers)):
        raise TypeError(f"tiers is {tiers!r}: give a text such as 'cpu=32GB,disk=/data/spill:100GB', or Tiers(...)")
    if lr is not None and not isinstance(lr, (Real, torch.Tensor)):
        raise TypeError(f"lr is {lr!r}: give a number")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan is {plan!r}: give a Plan, such as Plan.from_json(text) or another trainer's plan")
    if scaler is not None and not isinstance(scaler, LossScaler):
        raise TypeError(
            f"scaler is a {type(scaler).__name__}: give a spu.LossScaler, which stages in threads can share"
        )


def warn_of_emulation(devices: Iterable[Device], precision: str) -> None:
    """Warn of cards of this process that have no bf16: torch emulates it there, slower than fp32, and
    ``torch.cuda.is_bf16_supported`` says that they have it.
    """
    for device in devices if precision == "bf16" else ():
        if device.torch_device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device.torch_device)
            if (major, minor) < _WITH_BF16:
                warnings.warn(
                    f"{device.name} has no bf16 (compute capability {major}.{minor}, bf16 begins at 8.0): products are "
                    "emulated, slower than in fp32, where the card itself computes precision='fp16'",
                    stacklevel=5,
                )


def _check_model(model: Any) -> None:
    """Raise ValueError for a model without values, or one that torch.compile has made one piece."""
    if inner_of_compiled(model) is not None:
        raise ValueError(
            "the model is compiled as a whole, so that no layers can be found in it: give the model itself "
            "(compiled._orig_mod), whose layers may be compiled one by one"
        )
    for part in model if isinstance(model, (list, tuple)) else [model]:
        for name, parameter in part.named_parameters() if isinstance(part, torch.nn.Module) else ():
            if parameter.is_meta:
                raise ValueError(
                    f"{name} is on the meta device and has no values: make the model without torch.device('meta'), or "
                    "load its weights first"
                )
