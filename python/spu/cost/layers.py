"""Counted costs of a model's layers, and of its loss, in the order in which a batch goes through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spu.common.dtypes import DTYPES
from spu.common.torch_private import is_fake, pytree
from spu.cost.count import Run, loss_run, training_costs
from spu.cost.measure import Detached
from spu.model.layers import Layer, Moment
from spu.model.stand_in import unmade_parameter
from spu.plan.layer_cost import LayerCost
from spu.settings import Settings
from spu.skips import carried_by

__all__ = ["LossFn", "check_made", "model_costs"]

LossFn = Callable[[Any, Any], torch.Tensor]
_ANY = Moment(0, 0, 1)


def model_costs(
    layers: Sequence[Layer],
    sample: Any,
    settings: Settings,
    loss_fn: LossFn | None = None,
    targets: Any = None,
) -> tuple[list[LayerCost], LayerCost | None]:
    """Costs of a model's layers, and of its loss if there are targets, for one microbatch in training.

    Raises:
        ValueError: a layer cannot be run on fake tensors.
    """

    rehearsal, dtype = Detached(), DTYPES[settings.precision]
    products = dtype if dtype.itemsize == 2 else None

    def run(layer: Layer) -> Run:
        def call(module: nn.Module, x: Any) -> Any:
            with carried_by(rehearsal):
                return replace(layer, module=module, products=products).run(x, sample, _ANY)

        # Only of decoders' layers is it known that nothing else tells them apart.
        return Run(layer.name, layer.module, call, alike=layer.wants_inputs)

    runs = [run(layer) for layer in layers]
    if loss_fn is not None and targets is not None:
        runs.append(loss_run(loss_fn, targets))
    costs = training_costs(runs, sample, dtype, fused=settings.fused, real=_has_values(layers, sample))
    return (costs[:-1], costs[-1]) if len(costs) > len(layers) else (costs, None)


def check_made(layers: Sequence[Layer]) -> None:
    """Whether every parameter has a shape.

    Raises:
        ValueError: one of a lazy module has none yet; names it.
    """
    for layer in layers:
        name = unmade_parameter(layer.module)
        if name is not None:
            kind = type(layer.module).__name__
            raise ValueError(
                f"layer {layer.name!r} has a parameter without a shape yet, {name!r} of a {kind}: call the model once "
                "on a sample batch, model(inputs), before it is given to the trainer"
            )


def _has_values(layers: Sequence[Layer], sample: Any) -> bool:
    """Whether a layer can be run for real: False for a model on the meta device, or one without parameters to tell."""
    state = [p for layer in layers for p in layer.module.parameters()]
    given = [t for t in pytree.tree_leaves(sample) if isinstance(t, torch.Tensor)]
    return not any(t.is_meta or is_fake(t) for t in [*given, *state])
