"""From a flat list of layers to stages on devices: precision, placement, and parameters that several stages use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spu import nn as spu_nn
from spu.engine.layers import Layer
from spu.engine.stage import Stage

if TYPE_CHECKING:
    from spu.devices import Device

__all__ = ["DTYPES", "Built", "TiedUse", "build_stages", "to_precision", "undo_precision"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class TiedUse:
    """A parameter's use in a later stage than its first: a leaf of its own, with a gradient buffer of its own."""

    owner: nn.Parameter
    owner_stage: int
    alias: nn.Parameter
    stage: int
    places: list[tuple[nn.Module, str]]

    def restore(self) -> None:
        """Put the owner back where the alias stands."""
        for module, name in self.places:
            module._parameters[name] = self.owner


@dataclass
class Built:
    """Stages ready to run.

    Attributes:
        stages: in pipeline order.
        owned: for each stage the trainable parameters that its optimizer updates, by name.
        tied: further uses of owned parameters, in stage order.
        masters: fp32 values of 16-bit parameters from before they were rounded, by parameter id.
    """

    stages: list[Stage]
    owned: list[dict[str, nn.Parameter]]
    tied: list[TiedUse]
    masters: dict[int, torch.Tensor] = field(default_factory=dict)

    def restore(self) -> None:
        """Give the model its ties back; harmless when called twice."""
        for use in self.tied:
            use.restore()


def to_precision(layers: Sequence[Layer], precision: str, *, fused: bool = False) -> dict[int, torch.Tensor]:
    """Convert floating parameters and buffers in place, and return the fp32 values that rounding lost.

    In a 16-bit precision, linear layers also become :class:`spu.nn.Linear`, whose backward knows the loss scale.

    Args:
        layers: the model.
        precision: "fp16", "bf16" or "fp32".
        fused: let linear layers become :class:`spu.nn.Linear` in fp32 too: schedules that put weight gradients off
            need it, since plain autograd computes both gradients of a layer at once.

    Returns:
        parameter id -> fp32 master, for trainable parameters that are 16-bit now and had another dtype before.
    """
    dtype = DTYPES[precision]
    masters: dict[int, torch.Tensor] = {}
    for layer in layers:
        for parameter in layer.module.parameters():
            rounded = parameter.is_floating_point() and parameter.dtype != dtype
            if dtype.itemsize == 2 and parameter.requires_grad and rounded and id(parameter) not in masters:
                masters[id(parameter)] = parameter.detach().to(torch.float32, copy=True)
    for layer in layers:
        layer.module.to(dtype)
        if dtype.itemsize == 2 or fused:
            spu_nn.accelerate(layer.module)
    return masters


def undo_precision(layers: Sequence[Layer], masters: dict[int, torch.Tensor]) -> None:
    """Give rounded parameters their fp32 values back, and linear layers their own class, where training never began."""
    for layer in layers:
        spu_nn.restore(layer.module)
        for parameter in layer.module.parameters():
            if id(parameter) in masters:
                parameter.data = masters[id(parameter)]


def build_stages(
    layers: Sequence[Layer],
    ranges: Sequence[range],
    devices: Sequence[Device],
    *,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    recompute: Collection[int] = (),
) -> Built:
    """Move layers to their devices and give every stage leaves of its own.

    Args:
        layers: the whole model.
        ranges: the layers of each stage.
        devices: the device of each stage; several stages may have the same one.
        loss_fn: what the last stage computes.
        recompute: indices of the layers that keep only their input for the backward.
    """
    placed = [[layers[i] for i in indices] for indices in ranges]
    _separate(placed)
    tied = _untie(placed, devices)
    stages = []
    for index, (own, device) in enumerate(zip(placed, devices)):
        for layer in own:
            layer.module.to(device.torch_device)
        is_last = index == len(placed) - 1
        again = [i in recompute for i in ranges[index]]
        stages.append(Stage(index, own, device, is_last=is_last, loss_fn=loss_fn, recompute=again))
    aliases = {id(use.alias) for use in tied}
    owned: list[dict[str, nn.Parameter]] = []
    for own in placed:
        names: dict[int, str] = {}
        parameters: dict[str, nn.Parameter] = {}
        for layer in own:
            for name, parameter in layer.named_parameters():
                if parameter.requires_grad and id(parameter) not in aliases and id(parameter) not in names:
                    names[id(parameter)] = name
                    parameters[name] = parameter
        owned.append(parameters)
    return Built(stages, owned, tied)


def _separate(placed: list[list[Layer]]) -> None:
    """Give every stage module objects of its own, where layers of several stages share one; parameters stay shared.

    Otherwise those stages' threads would use one leaf, and one gradient buffer, at a time.
    """
    stage_of: dict[int, int] = {}
    for stage, own in enumerate(placed):
        for layer in own:
            modules = list(layer.module.modules())
            if any(stage_of.get(id(m), stage) != stage and (m._parameters or m._buffers) for m in modules):
                layer.module = _replica(layer.module, {})
            stage_of.update((id(m), stage) for m in modules if id(m) not in stage_of)


def _replica(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """The module and its children as new objects around the same parameters and buffers."""
    if id(module) not in made:
        copy = made[id(module)] = module.__new__(type(module))
        copy.__dict__ = dict(module.__dict__)
        copy._parameters, copy._buffers = dict(module._parameters), dict(module._buffers)
        copy._modules = {
            name: None if child is None else _replica(child, made) for name, child in module._modules.items()
        }
    return made[id(module)]


def _untie(placed: list[list[Layer]], devices: Sequence[Device]) -> list[TiedUse]:
    """Replace a parameter in every stage but its first by an alias: same storage on the same device, else a copy."""
    owner_stage: dict[int, int] = {}
    tied: dict[tuple[int, int], TiedUse] = {}
    for stage, own in enumerate(placed):
        for module in (module for layer in own for module in layer.module.modules()):
            for name, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                first = owner_stage.setdefault(id(parameter), stage)
                if first == stage:
                    continue
                use = tied.get((id(parameter), stage))
                if use is None:
                    data = parameter.detach().to(devices[stage].torch_device)
                    alias = nn.Parameter(data, requires_grad=parameter.requires_grad)
                    use = tied[id(parameter), stage] = TiedUse(parameter, first, alias, stage, [])
                    owner_stage[id(alias)] = stage
                module._parameters[name] = use.alias
                use.places.append((module, name))
    return list(tied.values())
