"""What the trainer accepts as a model, as a flat list of named layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from spu.engine.randomness import LayerRandomness
from spu.skips import Recorded, carried_by, current_carrier

__all__ = ["Layer", "Moment", "model_layers", "parts_as_layers"]


@dataclass(frozen=True)
class Moment:
    """Where in training a layer runs; with the layer's name it decides every random draw."""

    run_seed: int
    step: int
    microbatch: int


@dataclass
class Layer:
    """One indivisible piece of the model.

    Attributes:
        name: unique in the model.
        module: called as ``module(x)``, or as ``module(x, inputs)`` if ``wants_inputs``.
        wants_inputs: the module also reads the microbatch's own inputs (masks, positions).
        parameter_names: local parameter and buffer name -> name in the user's model, for checkpoints.
    """

    name: str
    module: nn.Module
    wants_inputs: bool = False
    parameter_names: dict[str, str] = field(default_factory=dict)
    _stochastic: dict[bool, bool] = field(default_factory=dict)

    def run(self, x: Any, inputs: Any, moment: Moment) -> Any:
        """Call the module, with random draws that depend on ``moment`` and the layer's name alone."""
        training = self.module.training
        if moment.microbatch == 0 or self._stochastic.get(training, True):
            with LayerRandomness(moment.run_seed, moment.step, moment.microbatch, self.name) as context:
                output = self._call(x, inputs)
            # Most layers never draw; they skip the context, and its cost, but in each step's first microbatch: a
            # dropout may be switched on later.
            self._stochastic[training] = context.draws > 0 or self._stochastic.get(training, False)
            return output
        return self._call(x, inputs)

    def run_checkpointed(self, x: Any, inputs: Any, moment: Moment) -> Any:
        """As :meth:`run`, keeping only the layer's input for the backward, which runs the layer again.

        Raises:
            RuntimeError: the layer changes its input in place, other than by modules that say so (``inplace=True``).
        """
        in_place = any(getattr(module, "inplace", False) for module in self.module.modules())
        tensors = [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, torch.Tensor)]
        versions = [tensor._version for tensor in tensors]
        skips = Recorded(current_carrier())
        output = checkpoint(
            self._run_on_copy if in_place else self.run,
            x,
            inputs,
            moment,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (carried_by(skips), _again(self.module, skips)),
        )
        if versions != [tensor._version for tensor in tensors]:
            raise RuntimeError(
                f"layer {self.name!r} changes its input in place, so that running it again would not repeat it: "
                "change a copy there, or train with recompute=False"
            )
        return output

    def _run_on_copy(self, x: Any, inputs: Any, moment: Moment) -> Any:
        return self.run(pytree.tree_map_only(torch.Tensor, torch.clone, x), inputs, moment)

    def _call(self, x: Any, inputs: Any) -> Any:
        return self.module(x, inputs) if self.wants_inputs else self.module(x)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by their name in the user's model, one that is used twice under both names."""
        for local, parameter in self.module.named_parameters(remove_duplicate=False):
            yield self.parameter_names.get(local, f"{self.name}.{local}"), parameter

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Buffers that belong to the model's state (persistent ones), by their name in the user's model."""
        persistent = self.module.state_dict(keep_vars=True)
        for local, buffer in self.module.named_buffers():
            if local in persistent:
                yield self.parameter_names.get(local, f"{self.name}.{local}"), buffer


@contextlib.contextmanager
def _again(module: nn.Module, skips: Recorded) -> Iterator[None]:
    """Around a recomputation, which must change nothing and find what the first run found."""
    with skips.again(), _buffers_set_aside(module):
        yield


@contextlib.contextmanager
def _buffers_set_aside(module: nn.Module) -> Iterator[None]:
    """Run on copies of the buffers: a recomputation must not count a batch twice in running statistics."""
    own = [(m, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None]
    for holder, name, buffer in own:
        holder._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for holder, name, buffer in own:
            holder._buffers[name] = buffer


def model_layers(model: Any) -> list[Layer]:
    """The layers of an ``nn.Sequential``, a list of modules, or a Hugging Face decoder.

    Raises:
        ValueError: an empty model.
        TypeError: a model that has no known order of layers.
    """
    if isinstance(model, nn.Sequential):
        return _named(model._modules.items())  # named_children() leaves out the second use of a shared module
    if isinstance(model, (list, tuple, nn.ModuleList)):
        return parts_as_layers(list(model))
    if isinstance(model, nn.Module) and _is_hugging_face(model):
        from spu.integrations import huggingface

        return _named(huggingface.decoder_layers(model))
    raise TypeError(
        f"cannot tell the order of the layers of a {type(model).__name__}; pass an nn.Sequential, "
        "a list of layers, or a Hugging Face decoder with a base_model_pp_plan"
    )


def parts_as_layers(parts: Sequence[nn.Module]) -> list[Layer]:
    """Layers named by their index."""
    for index, part in enumerate(parts):
        if not isinstance(part, nn.Module):
            raise TypeError(f"layer {index} is a {type(part).__name__}, not an nn.Module")
    return _named((str(index), part) for index, part in enumerate(parts))


def _named(pairs: Any) -> list[Layer]:
    layers = []
    for name, module in pairs:
        names: Callable[[], dict[str, str]] | None = getattr(module, "parameter_names", None)
        layers.append(
            Layer(name, module, bool(getattr(module, "wants_inputs", False)), names() if callable(names) else {})
        )
    if not layers:
        raise ValueError("the model has no layers; pass at least one")
    return layers


def _is_hugging_face(model: nn.Module) -> bool:
    if not hasattr(model, "config"):
        return False
    from spu.integrations import huggingface

    return huggingface.is_decoder(model)
