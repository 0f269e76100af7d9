"""What a layer hands on: the tensors of its output, by shape and dtype, from a forward on fake tensors."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from spu.common.dtypes import HALVES
from spu.common.fake_ops import fake_copy
from spu.common.quiet import hushed
from spu.common.torch_private import FakeTensorMode
from spu.cost.count import kind_of
from spu.cost.footprint import DetachedSkips, TrainingForm, following, on_fakes, tensors_in
from spu.model.layers import Layer
from spu.model.stand_in import hooks_off
from spu.model.untouched import untouched
from spu.precision.dtypes import state_dtypes

__all__ = ["layer_outputs"]

Output = list[tuple[tuple[int, ...], torch.dtype, bool]]


def layer_outputs(layers: Sequence[Layer], sample: Any, dtype: torch.dtype, *, fused: bool) -> list[Output]:
    """Return for each layer (shape, dtype, requires a gradient) of the tensors that it hands to the next one.

    Args:
        layers: the first ones of a model, in order; they and the process stay as they are.
        sample: one microbatch's inputs.
        dtype: of the training.
        fused: linear layers run on our ops.

    Raises:
        ValueError: a layer cannot be run on fakes; the message names it.
    """
    outputs = _on_fakes(layers, sample, dtype, fused)
    return [[(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors_in(output)] for output in outputs]


def _on_fakes(layers: Sequence[Layer], sample: Any, dtype: torch.dtype, fused: bool) -> list[Any]:
    products = dtype if dtype in HALVES else None
    chain = [dataclasses.replace(layer, products=products) for layer in layers]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state = [t for layer in chain for t in itertools.chain(layer.module.parameters(), layer.module.buffers())]
    dtypes = {id(t): t.dtype for t in state} | state_dtypes([layer.module for layer in chain], dtype)
    outputs: list[Any] = []
    known: dict[Any, Any] = {}
    with untouched(*(layer.module for layer in chain)), hooks_off(), hushed(), torch.inference_mode(False):
        x = fake_copy(mode, sample)
        form = TrainingForm(dtypes, fused, False, x, DetachedSkips())
        for layer in chain:
            kind = kind_of(layer.module, x) if layer.wants_inputs else None  # as where layers are costed
            if kind is None or kind not in known:
                known[kind] = _output(layer, x, form, mode)
            x = known[kind]
            outputs.append(x)
        form.skips.tensors.clear()
    return outputs


def _output(layer: Layer, x: Any, form: TrainingForm, mode: FakeTensorMode) -> Any:
    try:
        copy = form.copied(layer, mode)
        with on_fakes(mode):
            return following(form.run(copy, following(x)))
    except Exception as error:
        raise ValueError(
            f"layer {layer.name!r} could not be run on fake tensors ({type(error).__name__}: {error}): stages "
            "in several processes need the sizes of what crosses before, not depending on values"
        ) from error
