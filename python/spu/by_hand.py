"""The parts of a model on their devices, called by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from spu import placement
from spu.devices import Device
from spu.engine.bridge import Bridge, StageModule
from spu.engine.layers import Layer, model_layers, parts_as_layers

__all__ = ["ByHand"]


class ByHand:
    """Holds a model, whole or in parts that are added one by one, and hands the parts out on their devices.

    Args:
        model: an ``nn.Sequential``, a list of layers, or a Hugging Face decoder; or None, with :meth:`add_module`.
        devices: in pipeline order.
    """

    def __init__(self, model: Any, devices: Sequence[Device]) -> None:
        self.devices = list(devices)
        self._model = model
        self._layers: list[Layer] | None = None if model is None else model_layers(model)
        self._parts: list[nn.Module] = []
        self._stage_modules: list[StageModule] = []
        self._settled = False  # parts have been placed

    def add_module(self, part: nn.Module) -> None:
        """Add the next part of the model; parts run in the order they were added.

        Raises:
            TypeError: not a module.
            ValueError: the trainer was given a whole model, or has run already.
        """
        if not isinstance(part, nn.Module):
            raise TypeError(f"add_module takes an nn.Module, got {type(part).__name__}")
        if self._layers is not None and not self._parts:
            raise ValueError("this trainer was given a whole model; add parts to ModelParallelTrainer(devices=...)")
        if self._settled:
            raise ValueError("parts cannot be added any more: the trainer has placed the ones it has")
        self._parts.append(part)
        self._layers = parts_as_layers(self._parts)

    def modules(self) -> Iterator[StageModule]:
        """The parts on their devices, in order, to be called by hand; gradients cross a ``detach`` between them."""
        if not self._stage_modules:
            layers = self._require_layers()
            bridge = Bridge()
            homes = placement.place_parts(layers, self.devices)
            for index, (layer, device) in enumerate(zip(layers, homes)):
                layer.module.to(device.torch_device)
                self._settled = True
                self._stage_modules.append(StageModule(layer.module, index, device.torch_device, bridge))
        return iter(self._stage_modules)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter of the model, once."""
        seen = {id(p): p for layer in self._require_layers() for p in layer.module.parameters()}
        return iter(seen.values())

    def _users_model(self) -> nn.Module:
        """What the user gave, parts and lists of layers as a container of them."""
        return self._model if isinstance(self._model, nn.Module) else nn.ModuleList(self._model or self._parts)

    def _require_layers(self) -> list[Layer]:
        if self._layers is None:
            raise ValueError("the trainer has no model: pass one, or call add_module() for each part")
        return self._layers
