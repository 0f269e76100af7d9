"""A check that the model still has the structure that its stages and optimizers were built from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn

from spu.common import torch_private
from spu.engine.build import BuiltStages
from spu.model.layers import Layer
from spu.model.spaces import dotted

__all__ = ["StructureCheck"]

_REMEDY = "save() the trainer, make a new one for the model as it is now, prepare() and load()"


@dataclass(frozen=True)
class _Seen:
    """A parameter as it was when the stages were built."""

    key: str
    parameter: nn.Parameter | None
    trained: bool
    kind: tuple[torch.dtype, torch.device, torch.Size] | None

    @staticmethod
    def of(key: str, parameter: nn.Parameter | None) -> _Seen:
        if parameter is None:
            return _Seen(key, None, False, None)
        return _Seen(key, parameter, parameter.requires_grad, (parameter.dtype, parameter.device, parameter.shape))


@dataclass(frozen=True)
class _Tables:
    """All modules' tables one after another: the same in nearly every step, and compared without a line of Python for
    each module.
    """

    lengths: list[int]
    names: list[str]
    members: list[nn.Module | nn.Parameter | None]
    kinds: list[Any]

    @staticmethod
    def of(modules: list[nn.Module]) -> _Tables | None:
        """Return those of now; None where a module of TorchScript has tables of its own kind."""
        tables = list(chain.from_iterable(map(_TABLES_OF, modules)))
        if set(map(type, tables)) - {dict, OrderedDict}:
            return None
        members = list(chain.from_iterable(map(dict.values, tables)))
        parameters = [member for member in members if isinstance(member, torch.Tensor)]
        return _Tables(
            list(map(len, tables)), list(chain.from_iterable(tables)), members, list(map(_KIND_OF, parameters))
        )

    def same(self, others: _Tables | None) -> bool:
        return (
            others is not None
            and (self.lengths, self.names, self.kinds) == (others.lengths, others.names, others.kinds)
            and all(map(is_, self.members, others.members))
        )


_TABLES_OF = attrgetter(torch_private.MODULE_TABLES[0], torch_private.MODULE_TABLES[2])  # buffers may be replaced
_KIND_OF = attrgetter("dtype", "device", "shape", "requires_grad")


class StructureCheck:
    """Remembers a prepared model, and finds parameters and modules replaced, added, converted or unfrozen since.

    New *values* are allowed: training continues from them. So is a parameter frozen later: it is not updated.

    Args:
        model: the user's module, or list of modules.
        built: its stages, which are not running.
    """

    def __init__(self, model: Any, built: BuiltStages) -> None:
        self._rows = []
        known: set[int] = set()
        for name, module, layer in _modules(model, built):
            if id(module) in known:
                continue
            known.add(id(module))
            seen = [_Seen.of(key, parameter) for key, parameter in torch_private.parameters_of(module).items()]
            self._rows.append((name, module, layer, dict(_table(torch_private.children_of(module))), seen))
        self._list = (model, list(model)) if isinstance(model, (list, nn.ModuleList)) else None
        self._modules = [row[1] for row in self._rows]
        self._outer = [(name, module) for name, module, layer, *_ in self._rows if layer is None]
        self._tables = _Tables.of(self._modules)

    def check(self, *, training: bool = True) -> None:
        """Raise RuntimeError for a change; a parameter that was unfrozen is an error in training only."""
        if self._list is not None and not _same(list(self._list[0]), self._list[1]):
            raise RuntimeError(f"the list of layers has changed since this trainer prepared: undo it, or {_REMEDY}")
        for name, module in self._outer:
            if any(getattr(module, hooks, None) for hooks in torch_private.MODULE_HOOKS):
                raise RuntimeError(
                    f"{f'module {name!r}' if name else 'the model'} ({type(module).__name__}) has a hook, but a "
                    "pipeline calls the layers one by one and never the whole: register it on a layer"
                )
        tables = _Tables.of(self._modules)
        if tables is None or not tables.same(self._tables):
            self._find(training)

    def _find(self, training: bool) -> None:
        """Look at each module and parameter by itself, and raise for the first change that is not allowed."""
        for name, module, layer, children, parameters in self._rows:
            now, own = _table(torch_private.children_of(module)), _table(torch_private.parameters_of(module))
            if now.keys() != children.keys() or not _same(now.values(), children.values()):
                changed = next(k for k in {**children, **now} if now.get(k, self) is not children.get(k, self))
                raise RuntimeError(
                    f"module {_named(name, changed, layer)!r} was replaced, added or removed after this trainer "
                    f"prepared, which trains the one of then: undo it, or {_REMEDY}"
                )
            if own.keys() != {seen.key for seen in parameters}:
                added = sorted(own.keys() ^ {seen.key for seen in parameters})[0]
                raise RuntimeError(
                    f"parameter {_named(name, added, layer)!r} was added or removed after this trainer prepared, which "
                    f"would not train it: undo it, or {_REMEDY}"
                )
            for seen in parameters:
                problem = _problem(seen, own[seen.key], training)
                if problem:
                    raise RuntimeError(f"parameter {_named(name, seen.key, layer)!r} {problem}")


def _table(table: Any) -> dict[str, Any]:
    """Return a module's parameters or children as a dict; a TorchScript module's table is none."""
    return table if isinstance(table, dict) else dict(table.items())


def _problem(seen: _Seen, now: nn.Parameter | None, training: bool) -> str:
    """Say why training cannot continue with a parameter; "" if it can."""
    if now is not seen.parameter:
        return (
            "was replaced after this trainer prepared, which trains the one of then: copy the values into that one "
            f"(parameter.data.copy_(...)), or {_REMEDY}"
        )
    if now is None:
        return ""
    kind = now.dtype, now.device, now.shape
    if kind != seen.kind:
        assert seen.kind is not None
        was = seen.kind
        return (
            f"is {kind[0]} {tuple(kind[2])} on {kind[1]} and was {was[0]} {tuple(was[2])} on {was[1]} when this "
            "trainer prepared: convert it back (model.to(...)), or make a new trainer for the model"
        )
    if training and now.requires_grad and not seen.trained:
        return (
            "was frozen when this trainer prepared and is not any more: no optimizer would update it. Freeze it again, "
            f"or {_REMEDY}: it then trains too"
        )
    return ""


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b))


def _named(name: str, key: str, layer: Layer | None) -> str:
    return dotted(name, key) if layer is None else layer.name_of(dotted(name, key))


def _modules(model: Any, built: BuiltStages) -> Iterator[tuple[str, nn.Module, Layer | None]]:
    """Yield (name, module, layer) of the stages' modules, then of the user's model with layer None."""
    for stage in built.stages:
        for layer in stage.parts:
            for name, module in layer.module.named_modules():
                yield name, module, layer
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            yield name, module, None
