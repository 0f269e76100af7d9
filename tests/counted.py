"""Costs of models and layers, counted once in a process: most of the time of many tests' trainers goes into that."""

from __future__ import annotations

import functools
import itertools
import sys
import types
import weakref
from collections import UserList
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import spu
from spu.cost import count
from spu.cost.count import model_costs
from spu.model.hf_context import Context
from spu.model.layers import Layer

_KNOWN: dict[Any, Any] = {}
_LAYERS: dict[Any, Any] = {}
_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.Size, torch.device)
_OF_MODULES = set(vars(nn.Module()))


class _Unknown(Exception):
    """Something may change the costs that cannot be compared."""


def counted_once(layers: Sequence[Layer], sample: Any, dtype: torch.dtype, **how: Any) -> Any:
    """As `spu.cost.count.model_costs`, which is called where nothing known is alike in all that decides the costs."""
    try:
        key = (_key(layers), _given((sample, how["targets"])), dtype, _how(how), spu.ops.forced_backend())
    except _Unknown:
        return _by_layers(layers, sample, dtype, how)
    if key not in _KNOWN:
        _KNOWN[key] = _by_layers(layers, sample, dtype, how)
    costs, loss = _KNOWN[key]
    return list(costs), loss


def _by_layers(layers: Sequence[Layer], sample: Any, dtype: torch.dtype, how: dict[str, Any]) -> Any:
    """The costs of a model that is not known, some of whose layers may be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(count, "_Counter", _Remembering)
        return model_costs(layers, sample, dtype, **how)


class _Remembering(count._Counter):
    """Counts on fakes only layers that differ from all known ones in what decides the cost."""

    def cost(self, x: Any, before: list[Any]) -> Any:
        layer, skips = self.layers[len(before)], self.form.skips.tensors
        try:
            key = () if skips else self._deciding(layer, x)
        except _Unknown:
            key = ()
        if key in _LAYERS:
            cost, leaves, spec = _LAYERS[key]
            return cost, pytree.tree_unflatten([self._fake(leaf) for leaf in leaves], spec)
        cost, after = super().cost(x, before)
        leaves, spec = pytree.tree_flatten(after)
        # Not what a layer hands on by a skip, nor what was counted on values.
        if key and not skips and cost.basis == "counted" and all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            described = [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in leaves]
            _LAYERS[key] = cost, described, spec
        return cost, after

    def _deciding(self, layer: Layer, x: Any) -> tuple[Any, ...]:
        form, module = self.form, layer.module
        dtypes = [form.dtypes.get(id(t)) for t in itertools.chain(module.parameters(), module.buffers())]
        how = (
            form.fused,
            form.deferred,
            self._has_values,
            layer.wants_inputs,
            layer.products,
            spu.ops.forced_backend(),
        )
        inputs = _given(form.inputs) if layer.wants_inputs else ()
        return _module(module, {}), _given(x), inputs, tuple(dtypes), how, spu.ops.forced_backend()

    def _fake(self, described: tuple[Any, ...]) -> torch.Tensor:
        shape, stride, dtype, device, wants = described
        with self.mode:
            return torch.empty_strided(shape, stride, dtype=dtype, device=device).requires_grad_(wants)


def _key(layers: Sequence[Layer]) -> tuple[Any, ...]:
    first: dict[int, int] = {}  # the same tensor in two places is a tie
    found = []
    for layer in layers:
        found.append((layer.name, layer.wants_inputs, layer.products, _module(layer.module, first)))
    return tuple(found)


def _module(module: nn.Module, first: dict[int, int]) -> tuple[Any, ...]:
    found: list[Any] = []
    for name, part in module.named_modules():
        own = {key: value for key, value in vars(part).items() if key not in _OF_MODULES}
        settings = tuple((key, _setting(own[key])) for key in sorted(own))
        found.append((name, type(part), type(part).forward, part.training, settings))
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        found.append((first.setdefault(id(tensor), len(first)), _tensor(tensor)))
    return tuple(found)


def _setting(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return type(value), repr(value)
    if isinstance(value, tuple | list | UserList):
        return type(value), tuple(map(_setting, value))
    if isinstance(value, weakref.ref):  # of what decides nothing but by being there
        return weakref.ref, value() is None
    if isinstance(value, dict):
        return type(value), tuple((_setting(key), _setting(held)) for key, held in value.items())
    if isinstance(value, set | frozenset) and all(isinstance(held, str) for held in value):
        return type(value), tuple(sorted(value))
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if hasattr(value, "to_json_string"):  # of transformers
        hidden = {key: held for key, held in vars(value).items() if key.startswith("_")}  # of attention, of experts
        return value.to_json_string(use_diff=False), _setting(hidden)
    if isinstance(value, Context):  # of a transformers decoder: what its layers are called with
        return Context, value._layers_name, value._returns, _module(value._template, {})
    if isinstance(value, functools.partial):
        return _setting(value.func), _setting(value.args), tuple((k, _setting(v)) for k, v in value.keywords.items())
    if _is_part(value, "torch.nn."):
        own = {key: held for key, held in vars(value).items() if key not in _OF_MODULES}
        return type(value), tuple((key, _setting(own[key])) for key in sorted(own)), _setting([*value.buffers()])
    if _is_part(value, "transformers."):
        return _module(value, {})  # what a decoder's model does after its head
    if isinstance(value, types.FunctionType):
        cells = tuple(_setting(cell.cell_contents) for cell in value.__closure__ or ())
        return value.__code__, value.__module__, cells, _setting(value.__defaults__)
    return _builtin(value)


def _is_part(value: Any, package: str) -> bool:
    """A module of a package without modules of its own."""
    return isinstance(value, nn.Module) and type(value).__module__.startswith(package) and not any(value.children())


def _builtin(value: Any) -> tuple[str, str]:
    """The name of what a module keeps for as long as the process runs."""
    name, module = getattr(value, "__qualname__", None), sys.modules.get(getattr(value, "__module__", None) or "")
    if name is None or getattr(module, name, None) is not value:
        raise _Unknown
    return module.__name__, name


def _how(how: dict[str, Any]) -> tuple[Any, ...]:
    rest = {name: value for name, value in how.items() if name != "targets"}
    return tuple((name, _setting(rest[name])) for name in sorted(rest))


def _tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.layout is not torch.strided:
        raise _Unknown
    return type(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _given(value: Any) -> tuple[Any, ...]:
    leaves, spec = pytree.tree_flatten(value)
    return tuple(map(_setting, leaves)), str(spec)
