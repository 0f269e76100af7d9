"""The model, given whole or part by part; its parts can be called by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from spu.common.moves import move_module
from spu.devices.manager import Device
from spu.model.layers import Layer, has_order, layers_by_tracing, model_layers, parts_as_layers
from spu.plan import partition
from spu.trainer.bridge import Bridge, StageModule

__all__ = ["Parts"]


class Parts:
    """Holds a model, whole or in parts that are added one by one, and hands the parts out on their devices.

    Args:
        model: an ``nn.Sequential``, a list of layers, a Hugging Face decoder, or any other module, which `layers_for`
            cuts into layers; or None, with `add`.

    Attributes:
        placed: the parts are on their devices; no more can be added.
    """

    def __init__(self, model: Any) -> None:
        self.placed = False
        self._model = model
        self._is_traced = model is not None and not has_order(model)
        self._layers: list[Layer] | None = None if model is None or self._is_traced else model_layers(model)
        self._added: list[nn.Module] = []
        self._stage_modules: list[StageModule] = []

    @property
    def given(self) -> Any:
        """The model, or the list of parts."""
        return self._added if self._model is None else self._model

    @property
    def layers(self) -> list[Layer]:
        """The model as a flat list of layers.

        Raises:
            ValueError: there is none yet.
        """
        if self._layers is None and self._is_traced:
            raise ValueError(
                f"the layers of a {type(self._model).__name__} are found on a first batch: call prepare(inputs, "
                "targets) first, or give the trainer an nn.Sequential or a list of layers"
            )
        if self._layers is None:
            raise ValueError("the trainer has no model: pass one, or call add_module() for each part")
        return self._layers

    def layers_for(self, inputs: Any) -> list[Layer]:
        """Return the model's layers; where they have no known order, as they are found on a batch of inputs.

        Raises:
            ValueError: there is no model yet, or it cannot be cut exactly.
        """
        if self._is_traced and not self.placed:
            self._layers = layers_by_tracing(self._model, inputs)
        return self.layers

    def parameters(self) -> list[nn.Parameter]:
        """Return every parameter of the model, once."""
        modules = [self._model] if self._is_traced else [layer.module for layer in self.layers]
        return list({id(p): p for module in modules for p in module.parameters()}.values())

    def as_module(self) -> nn.Module:
        """Return the user's module; of parts and lists of layers a container."""
        return self._model if isinstance(self._model, nn.Module) else nn.ModuleList(self.given)

    def add(self, part: nn.Module) -> None:
        """Add the next part of the model.

        Raises:
            TypeError: not a module.
            ValueError: there is a whole model, or the parts have been placed.
        """
        if not isinstance(part, nn.Module):
            raise TypeError(f"add_module takes an nn.Module, got {type(part).__name__}")
        if self._model is not None:
            raise ValueError("this trainer was given a whole model; add parts to ModelParallelTrainer(devices=...)")
        if self.placed:
            raise ValueError("parts cannot be added any more: the trainer has placed the ones it has")
        self._added.append(part)
        self._layers = parts_as_layers(self._added)

    def modules(self, devices: Sequence[Device]) -> Iterator[StageModule]:
        """Yield the parts on their devices, in order, to be called by hand; the first call places them."""
        if not self._stage_modules:
            bridge, made = Bridge(), list[StageModule]()
            for index, (layer, device) in enumerate(zip(self.layers, _place(self.layers, devices))):
                move_module(layer.module, device.torch_device)
                self.placed = True
                made.append(StageModule(layer.module, index, device.torch_device, bridge))
            self._stage_modules = made
        return iter(self._stage_modules)


def _place(layers: Sequence[Layer], devices: Sequence[Device]) -> list[Device]:
    """Return a device for each part of a hand-run model: one each if there are enough, else runs of equal bytes."""
    if len(layers) <= len(devices):
        return list(devices[: len(layers)])
    sizes = [1.0 + sum(p.numel() * p.element_size() for p in layer.module.parameters()) for layer in layers]
    ranges = partition(sizes, len(devices))
    return [device for indices, device in zip(ranges, devices) for _ in indices]
