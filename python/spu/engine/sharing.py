"""Parameters and modules in several stages: one object in the user's model, one for each stage while stages run.

A parameter that several stages use is one leaf in the user's model. Stages run in threads of their own. So each later
stage gets an *alias*, a leaf with a gradient buffer of its own. A module that several stages use gets a *twin* in each
later stage, an object around the same parameters. Between runs the model is the user's: aliases are gone, and changes
(values, frozen or not, modes, attributes) are copied before the next run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from spu.common import torch_private
from spu.common.torch_private import MODULE_TABLES, buffers_of, children_of, parameters_of
from spu.model.layers import Layer
from spu.model.spaces import Space, dotted, spaces_of

__all__ = ["TiedUse", "Twin", "separate", "untie"]


@dataclass
class TiedUse:
    """A parameter's use in a later stage than its first: a leaf of its own, with a gradient buffer of its own.

    Attributes:
        apart: the parameter is used in several processes, which tell one another its gradients and values.
        here: this stage is in this process.
    """

    owner: nn.Parameter
    owner_stage: int
    alias: nn.Parameter
    stage: int
    places: list[tuple[nn.Module, str]]
    apart: bool = False
    here: bool = True

    def enter(self) -> None:
        """Put the alias where the stage uses the parameter, with the owner's present values."""
        if not self.here:
            return
        self.alias.requires_grad_(self.owner.requires_grad)
        if self.alias.device != self.owner.device:
            self.alias.data.copy_(self.owner.data)
        elif self.alias.data_ptr() != self.owner.data_ptr():
            self.alias.data = self.owner.data
        for module, name in self.places:
            parameters_of(module)[name] = self.alias

    def add(self, gradient: torch.Tensor | None) -> None:
        """Add a gradient of this use, which belongs to this object from now on, to the owner's."""
        if gradient is None:
            return
        gradient = gradient.to(self.owner.device)
        if self.owner.grad is None:
            self.owner.grad = gradient
        else:
            self.owner.grad.add_(gradient)

    def restore(self) -> None:
        """Put the owner back where the alias stands; harmless when called twice."""
        for module, name in self.places:
            parameters_of(module)[name] = self.owner


@dataclass
class Twin:
    """A layer's module in a later stage than its first, with objects of its own all the way down.

    Attributes:
        layer: runs the twin until `restore`.
        module: the user's.
        pairs: (name in the layer, the user's module, its twin) of the module and of all its submodules.
    """

    layer: Layer
    module: nn.Module
    pairs: list[tuple[str, nn.Module, nn.Module]]
    _buffers: list[tuple[str, nn.Module, torch.Tensor | None, int]] = field(default_factory=list)
    _attributes: list[tuple[str, nn.Module, dict[str, Any]]] = field(default_factory=list)
    _held: list[tuple[Space, dict[Any, tuple[Any, int]]]] = field(default_factory=list)

    def enter(self) -> None:
        """Copy the changes in the user's module since the last run."""
        self._buffers, self._attributes = [], []
        for name, original, twin in self.pairs:
            theirs = {key: value for key, value in vars(original).items() if key not in MODULE_TABLES}
            for key in vars(twin).keys() - theirs.keys() - set(MODULE_TABLES):
                del twin.__dict__[key]
            twin.__dict__.update(theirs)
            self._attributes += [(name, original, theirs), (name, twin, theirs)]
            for key, buffer in buffers_of(original).items():
                mine = buffers_of(twin).get(key)
                if buffer is None or mine is None or mine.device == buffer.device:
                    buffers_of(twin)[key] = buffer
                else:
                    mine.copy_(buffer)
                for module in (original, twin):
                    held = buffers_of(module)[key]
                    self._buffers.append((dotted(name, key), module, held, _version(held)))
        # Both have the same dicts, lists and objects.
        self._held = [(space, _contents(space)) for space in spaces_of(self.module) if space.key]

    def check(self) -> None:
        """Check, after a run, that no forward changed shared state.

        Raises:
            RuntimeError: a forward has changed a buffer or an attribute, which each stage then has for itself.
        """
        changed = [
            name
            for name, module, buffer, version in self._buffers
            if buffers_of(module).get(name.rpartition(".")[2]) is not buffer or _version(buffer) != version
        ]
        for name, module, before in self._attributes:
            after = vars(module)
            changed += [
                dotted(name, key)
                for key in after
                if key not in MODULE_TABLES and before.get(key, self) is not after[key]
            ]
        for space, held in self._held:
            now = _contents(space)
            if list(now) != list(held) or any(now[k][0] is not held[k][0] or now[k][1] != held[k][1] for k in now):
                changed.append(dotted(space.path, space.key))
        if changed:
            raise RuntimeError(_has_state(self.layer.name, changed[0]))

    def restore(self) -> None:
        """Give the layer its own module back; harmless when called twice."""
        self.layer.module = self.module


def _version(buffer: torch.Tensor | None) -> int:
    return -1 if buffer is None or buffer.is_inference() else torch_private.version(buffer)


def _contents(space: Space) -> dict[Any, tuple[Any, int]]:
    """Return a space's values, of tensors with their versions."""
    return {key: (each, _version(each) if isinstance(each, torch.Tensor) else 0) for key, each in space.now().items()}


def _has_state(layer: str, what: str) -> str:
    return (
        f"layer {layer!r} is used in several stages, and its forward changes {what!r}: the stages run at the same "
        "time, so that its value would depend on chance. Put all its uses into one layer, give each use a module of "
        "its own, or switch the change off (eval() of that module)"
    )


def separate(placed: Sequence[Sequence[Layer]]) -> list[Twin]:
    """Give every stage module objects of its own, where layers of several stages share one; parameters stay shared.

    Otherwise those stages' threads would use one leaf, and one gradient buffer, at a time.

    Raises:
        ValueError: a shared module is a normalisation that counts statistics; nothing was changed.
    """
    stage_of: dict[int, int] = {}
    shared: list[Layer] = []
    for stage, own in enumerate(placed):
        for layer in own:
            modules = list(layer.module.named_modules())
            foreign = [
                n for n, m in modules if stage_of.get(id(m), stage) != stage and (parameters_of(m) or buffers_of(m))
            ]
            for name in foreign:
                module = layer.module.get_submodule(name)
                if isinstance(module, torch_private.NormBase) and module.track_running_stats and module.training:
                    raise ValueError(_has_state(layer.name, dotted(name, "running_mean")))
            if foreign:
                shared.append(layer)
            stage_of.update((id(m), stage) for _, m in modules if id(m) not in stage_of)
    return [_twin(layer) for layer in shared]


def _twin(layer: Layer) -> Twin:
    module, made = layer.module, {}  # type: nn.Module, dict[int, nn.Module]
    layer.module = _copy(module, made)
    return Twin(layer, module, [(name, m, made[id(m)]) for name, m in module.named_modules()])


def _copy(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Copy the module and its children as new objects around the same parameters and buffers."""
    if id(module) not in made:
        copy = made[id(module)] = module.__new__(type(module))
        copy.__dict__ = dict(module.__dict__)
        children = {name: None if child is None else _copy(child, made) for name, child in children_of(module).items()}
        torch_private.set_tables(copy, dict(parameters_of(module)), dict(buffers_of(module)), children)
    return made[id(module)]


def untie(placed: Sequence[Sequence[Layer]], devices: Sequence[torch.device]) -> list[TiedUse]:
    """Replace a parameter in every stage but its first by an alias: same storage on the same device, else a copy.

    Args:
        placed: the layers of each stage.
        devices: where the parameters of each stage are between runs.
    """
    tied: dict[tuple[int, int], TiedUse] = {}
    try:
        _untie(placed, devices, tied)
    except BaseException:  # a device has no room for a copy
        for use in tied.values():
            use.restore()
        raise
    return list(tied.values())


def _untie(
    placed: Sequence[Sequence[Layer]], devices: Sequence[torch.device], tied: dict[tuple[int, int], TiedUse]
) -> None:
    owner_stage: dict[int, int] = {}
    for stage, own in enumerate(placed):
        for module in (module for layer in own for module in layer.module.modules()):
            for name, parameter in list(parameters_of(module).items()):
                if parameter is None:
                    continue
                first = owner_stage.setdefault(id(parameter), stage)
                if first == stage:
                    continue
                use = tied.get((id(parameter), stage))
                if use is None:
                    data = parameter.detach().to(devices[stage])
                    alias = nn.Parameter(data, requires_grad=parameter.requires_grad)
                    use = tied[id(parameter), stage] = TiedUse(parameter, first, alias, stage, [])
                    owner_stage[id(alias)] = stage
                parameters_of(module)[name] = use.alias
                use.places.append((module, name))
