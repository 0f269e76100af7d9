"""Where a layer keeps what is no parameter: buffers, attributes, and the containers and objects in its attributes.

All of it can be looked at as names with values, and put back to earlier ones: what a forward counts may be an integer
of its module's, or lie in a dict, a list or an object of the user's there.
"""

from __future__ import annotations

import collections
import sys
import types
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from spu.common import torch_private

__all__ = ["Space", "dotted", "is_installed", "is_library", "spaces_of"]

_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "transformers", "triton", "spu"}
_INSTALLED = ("site-packages", "dist-packages")
_CONTAINERS = (dict, list, set, collections.deque)
_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.dtype, torch.device})
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_MOST = 10_000  # entries of a layer's containers and objects: a layer that reaches more holds data, which stays


def dotted(path: str, key: str) -> str:
    """Return a name below a module's path, which is "" for the layer's own."""
    return f"{path}.{key}" if path else key


class Space:
    """Names with values: a table that others hold too, and may read meanwhile. It is never empty in between.

    Args:
        path: of the module, in the layer.
        key: of the attribute in which it lies, and where in it; "" for the attributes and the buffers themselves.
        held: the table.
    """

    __slots__ = ("held", "key", "path")

    def __init__(self, path: str, key: str, held: Any) -> None:
        self.path, self.key, self.held = path, key, held

    def now(self) -> dict[Any, Any]:
        """Return its names and values."""
        return dict(self.held)

    def become(self, then: dict[Any, Any]) -> None:
        """Give it these names and values again; write nothing where nothing differs."""
        held = self.held
        for name in [name for name in held if name not in then]:
            del held[name]
        for name, value in then.items():
            if name not in held or held[name] is not value:
                held[name] = value


class _Dict(Space):
    """A dict of the user's, whose order may count."""

    __slots__ = ()

    def become(self, then: dict[Any, Any]) -> None:
        if not (_same(self.held, then) and _same(self.held.values(), then.values())):
            self.held.clear()
            for name, value in then.items():
                self.held[name] = value


class _Sequence(Space):
    """A list, a deque or a set."""

    __slots__ = ()

    def now(self) -> dict[Any, Any]:
        return dict(enumerate(self.held))

    def become(self, then: dict[Any, Any]) -> None:
        if not _same(self.held, then.values()):
            self.held.clear()
            (self.held.update if isinstance(self.held, set) else self.held.extend)(then.values())


def spaces_of(module: nn.Module) -> list[Space]:
    """Return the places in which a layer's modules keep something, each once."""
    walk = _Walk()
    for path, part in module.named_modules():
        own = vars(part)
        walk.found += (Space(path, "", torch_private.buffers_of(part)), Space(path, "", own))
        for key, value in own.items():
            if type(value) not in _ATOMS and key not in _OF_EVERY_MODULE:
                walk.into(path, key, value)
    return walk.found


class _Walk:
    """Finds the containers and the objects of the user's that attributes are, or hold."""

    def __init__(self) -> None:
        self.found: list[Space] = []
        self._known: set[int] = set()
        self._room = _MOST

    def into(self, path: str, key: str, value: Any) -> None:
        """Add what an attribute's value is or holds."""
        if isinstance(value, tuple):
            for index, each in enumerate(value):
                self.into(path, f"{key}[{index}]", each)
            return
        space = _space(path, key, value)
        if space is None or id(value) in self._known or len(space.held) > self._room:
            return
        self._known.add(id(value))
        self._room -= len(space.held)
        self.found.append(space)
        for name, each in space.now().items():
            if type(each) not in _ATOMS:
                self.into(path, f"{key}[{name!r}]", each)


def _space(path: str, key: str, value: Any) -> Space | None:
    if isinstance(value, _CONTAINERS):
        return (_Dict if isinstance(value, dict) else _Sequence)(path, key, value)
    kind = type(value)
    own = getattr(value, "__dict__", None) if _is_object(kind) else None  # type: ignore[arg-type]  # a metaclass hashes
    return Space(path, key, own) if isinstance(own, dict) else None


def _same(a: Collection[Any], b: Collection[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b))


@lru_cache(maxsize=4096)
def _is_object(kind: type) -> bool:
    """Tell whether objects of a type are the user's, and no modules: those are looked at by themselves."""
    if issubclass(kind, (nn.Module, torch.Tensor, type, types.ModuleType)):
        return False
    return kind is types.SimpleNamespace or not (is_library(kind.__module__) or is_installed(kind.__module__))


def is_library(module: str | None) -> bool:
    """Tell whether a module, by its name, is of Python, torch, spu, or what they stand on."""
    return (module or "builtins").split(".")[0] in _LIBRARIES


def is_installed(module: str | None) -> bool:
    """Tell whether a module is of an installed package."""
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return any(part in file for part in _INSTALLED)
