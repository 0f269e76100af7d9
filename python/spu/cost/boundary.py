"""What a layer hands on: the tensors of its output, by shape and dtype, from a run on fake tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from spu.cost.count import model_costs
from spu.cost.footprint import tensors_in
from spu.model.layers import Layer

__all__ = ["layer_outputs"]


def layer_outputs(
    layers: Sequence[Layer], sample: Any, dtype: torch.dtype, *, fused: bool
) -> list[list[tuple[tuple[int, ...], torch.dtype, bool]]]:
    """Return for each layer (shape, dtype, requires a gradient) of the tensors that it hands to the next one.

    Args:
        layers: of a model, in order.
        sample: one microbatch's inputs.
        dtype: of the training.
        fused: linear layers run on our ops.

    Raises:
        ValueError: a layer cannot be run on fakes.
    """
    outputs: list[Any] = []
    model_costs(layers, sample, dtype, fused=fused, deferred=False, outputs=outputs)
    return [[(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors_in(output)] for output in outputs]
