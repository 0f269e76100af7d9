"""Each stage's optimizer, made by what the user gave: a class, a ``functools.partial`` of one, or a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from spu.engine.optimizer_state import remember_groups
from spu.optim.adamw import AdamW, MasterOptimizer
from spu.optim.forms import is_ours

__all__ = ["OptimizerFactory", "check_class", "make_optimizer", "set_masters"]

OptimizerFactory = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


def check_class(kind: type) -> None:
    """Raise ValueError for optimizers that no trainer can step: those that call the model again, or want sparse
    gradients.
    """
    if issubclass(kind, torch.optim.SparseAdam):
        raise ValueError(
            "SparseAdam steps sparse gradients alone, and a trainer's main gradients are dense: use torch.optim.Adam, "
            "or spu.optim.AdamW"
        )
    step = getattr(kind, "step", None)
    arguments = list(inspect.signature(step).parameters.values())[1:] if callable(step) else []
    needed = [a.name for a in arguments if a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    if needed:
        raise ValueError(
            f"{kind.__name__}.step() needs {', '.join(needed)}: a trainer runs the batch once for each update, and has "
            "no function that computes loss and gradients again. Use an optimizer whose step() needs no argument, or "
            "spu.accelerate(model) in a loop of your own"
        )


def make_optimizer(
    parameters: Sequence[nn.Parameter],
    masters: dict[int, torch.Tensor],
    optimizer: OptimizerFactory | type[torch.optim.Optimizer] | None,
    lr: float | None,
) -> AdamW | MasterOptimizer:
    """Make a stage's optimizer.

    Args:
        parameters: that the stage owns, at least one.
        masters: fp32 values of 16-bit parameters, by parameter id.
        optimizer, lr: as `spu.engine.update.Updater` takes them.

    Raises:
        ValueError: an optimizer that cannot be stepped here, a rate that would be ignored, or nothing in this stage
            that the optimizer updates.
    """
    factory: Any = AdamW if optimizer is None else optimizer
    if isinstance(factory, type) and lr is not None:
        factory = partial(factory, lr=lr)
    made: AdamW | MasterOptimizer
    if is_ours(factory):
        made = factory(list(parameters))
    else:
        try:
            on_masters = MasterOptimizer(factory, parameters, [masters.get(id(p)) for p in parameters])
        except ValueError as error:
            if "empty parameter list" not in str(error):
                raise
            shapes = ", ".join(str(tuple(parameter.shape)) for parameter in parameters[:3])
            raise ValueError(
                f"{error}: it is made for each stage by itself, and one of them has nothing that it takes (its "
                f"parameters are of shape {shapes}{', ...' if len(parameters) > 3 else ''}). Use fewer stages or other "
                "ones (plan=), or an optimizer that takes every parameter"
            ) from error
        made = _without_masters(on_masters, parameters)
    check_class(type(made.optimizer if isinstance(made, MasterOptimizer) else made))
    remember_groups(made)
    rates = [group.get("lr") for group in made.param_groups]
    if lr is not None and any(rate != lr for rate in rates):
        raise ValueError(
            f"lr={lr} would be ignored: the optimizer that was given sets its own lr, {rates[0]}. Give the rate there "
            "(functools.partial(..., lr=...)), and none to the trainer"
        )
    return made


def set_masters(
    optimizer: AdamW, parameters: Iterable[nn.Parameter], masters: dict[int, torch.Tensor], empty: Collection[int] = ()
) -> None:
    """Set the masters now, not at the first step: a checkpoint may be loaded before it.

    Args:
        optimizer: of the parameters.
        parameters: those in 16 bits have masters.
        masters: fp32 values by parameter id; those of the parameters are taken out.
        empty: ids of parameters whose values come later, master and all; what these have here is not written.
    """
    for parameter in parameters:
        if parameter.dtype.itemsize == 2:
            value = masters.pop(id(parameter), parameter)
            if id(parameter) not in empty:
                optimizer.set_master(parameter, value)


def _without_masters(made: MasterOptimizer, parameters: Sequence[nn.Parameter]) -> AdamW | MasterOptimizer:
    """Return our AdamW, which a function of the user's has made, on the parameters: it keeps masters by itself, in a
    form that memory tiers can lay out. Return any other optimizer as it is.
    """
    ours = made.optimizer
    own = {id(made.target(parameter)): parameter for parameter in parameters}
    given = [group["params"] for group in ours.param_groups]
    if not isinstance(ours, AdamW) or ours.state or own.keys() != {id(target) for part in given for target in part}:
        return made
    for part in given:
        part[:] = [own[id(target)] for target in part]
    return ours
