"""Run a user's code, and put back afterwards whatever it has changed in Python's objects.

Planning runs layers and losses that may count their calls, fill caches and keep what they see. Their tensors are
copies (`spu.model.stand_in`). Everything else that the code can reach is noted here before, and put back: attributes,
lists, dicts and sets, variables of enclosing functions, module and class variables that the code names, caches of
`functools`, generators of random numbers. Objects of the standard library, of torch and of other installed packages
are left alone, but for containers and modules.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from spu.common import torch_private
from spu.common.torch_private import TorchDispatchMode
from spu.model.spaces import is_installed, is_library

__all__ = ["untouched"]

_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, range, slice)
_CONTAINERS = (dict, list, set, collections.deque, bytearray)
_HOLDERS = ("collections", "weakref", "queue")  # of the standard library, objects that hold others


@contextlib.contextmanager
def untouched(*roots: Any, values: bool = False) -> Iterator[Callable[[], contextlib.AbstractContextManager[Any]]]:
    """Put back at the end whatever code has changed of the objects that it reaches from ``roots``.

    Generators of random numbers, the default dtype and whether gradients are computed are put back too.

    Args:
        roots: modules, functions, anything that will be called.
        values: the code runs on real tensors, and may write into older ones and give them gradients: put those back
            too, and call no hooks of theirs.

    Yields:
        A function that makes a context: with ``values``, other threads enter one before they run such code.
    """
    reached = _Reached(roots, values)
    dtype, python = torch.get_default_dtype(), random.getstate()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy is not None else None
    kept = _Values(reached.tensors) if values else None
    watched = contextlib.nullcontext if kept is None else functools.partial(_Writes, kept)
    try:
        with torch.random.fork_rng(devices=gpus), torch.enable_grad(), watched():
            yield watched
    finally:
        if kept is not None:
            kept.put_back()
        reached.put_back()
        torch.set_default_dtype(dtype)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(drawn)


class _Reached:
    """The objects that can be reached from some roots, and how to put them back. Compares identities, never values."""

    def __init__(self, roots: tuple[Any, ...], values: bool) -> None:
        self.tensors: list[torch.Tensor] = []
        self._values = values
        self._known: dict[int, Any] = {}  # keeps what it names alive, so that no id is used twice
        self._undo: list[Callable[[], object]] = []
        self._left: list[Any] = list(roots)
        while self._left:
            with contextlib.suppress(Exception):  # an object may refuse to be looked at
                self._note(self._left.pop())

    def put_back(self) -> None:
        for undo in reversed(self._undo):
            undo()

    def _note(self, value: Any) -> None:
        if isinstance(value, _ATOMS) or id(value) in self._known:
            return
        self._known[id(value)] = value
        if isinstance(value, torch.Tensor):
            self._tensor(value)
        elif isinstance(value, _CONTAINERS):
            self._container(value)
        elif isinstance(value, tuple | frozenset):
            self._left.extend(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._left += [value.__self__, value.__func__]
        elif isinstance(value, functools.partial):
            self._left += [value.func, value.args, value.keywords]
        elif isinstance(value, functools._lru_cache_wrapper):
            self._undo.append(functools.partial(_forget, value, value.cache_info().misses))
            self._left.append(value.__wrapped__)
        elif isinstance(value, types.CellType):
            self._cell(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, torch.Generator):
            self._undo.append(functools.partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._undo.append(functools.partial(value.setstate, value.getstate()))
        elif isinstance(value, property | staticmethod | classmethod):
            self._left += [getattr(value, name, None) for name in ("fget", "__func__")]
        elif _walked(value):
            self._object(value)

    def _tensor(self, tensor: Any) -> None:  # a torch.Tensor, whose stubs have no None for hooks
        self.tensors.append(tensor)
        if type(tensor) is not torch.Tensor or tensor.__dict__:
            self._attributes(tensor)
        if tensor.is_inference():  # has no version
            return
        gradient, version = tensor.grad if tensor.is_leaf else None, torch_private.version(tensor)
        hooks = torch_private.backward_hooks(tensor)
        post_hooks = torch_private.post_accumulate_hooks(tensor) if tensor.is_leaf else None
        self._left.append(gradient)
        bare = self._values and tensor.is_leaf and tensor.requires_grad
        if bare:
            tensor.grad = None
            torch_private.set_hooks(tensor, None, None)

        def undo() -> None:
            if tensor.is_leaf and tensor.grad is not gradient:
                tensor.grad = gradient
            if bare:
                torch_private.set_hooks(tensor, hooks, post_hooks)
            if torch_private.version(tensor) != version:
                torch_private.set_version(tensor, version)

        self._undo.append(undo)

    def _container(self, value: Any) -> None:
        before = list(_items(value))

        def undo() -> None:
            now = list(_items(value))
            if len(now) == len(before) and all(_same(a, b) for a, b in zip(now, before)):
                return
            value.clear()
            (value.update if isinstance(value, dict | set) else value.extend)(before)

        self._undo.append(undo)
        if not isinstance(value, bytearray):
            self._left.extend(value.items() if isinstance(value, dict) else value)
        self._attributes(value)

    def _function(self, function: types.FunctionType) -> None:
        if is_library(function.__module__):
            return
        self._left += [*(function.__closure__ or ()), function.__defaults__, function.__kwdefaults__, function.__dict__]
        self._left.append(getattr(function, "__wrapped__", None))
        names = set(_names(function.__code__))
        self._variables(function.__globals__, names)

    def _variables(self, space: dict[str, Any], names: set[str]) -> None:
        """Note the module variables that code names, also in modules of the user's among them."""
        spaces = [space]
        for own in spaces:  # grows: packages and their modules may name one another
            read = functools.partial(lambda own: {name: own[name] for name in names if name in own}, own)
            for value in self._named(read, own.__setitem__, own.__delitem__).values():
                if not isinstance(value, types.ModuleType):
                    self._left.append(value)
                elif not is_library(value.__name__) and all(vars(value) is not other for other in spaces):
                    spaces.append(vars(value))

    def _named(
        self, read: Callable[[], dict[str, Any]], put: Callable[[str, Any], object], drop: Callable[[str], object]
    ) -> dict[str, Any]:
        """Note which names have which values: as ``read()`` returns them now, ``put`` and ``drop`` set them later."""
        before = read()

        def undo() -> None:
            now = read()
            for name in now.keys() - before.keys():
                drop(name)
            for name, value in before.items():
                if name not in now or now[name] is not value:
                    put(name, value)

        self._undo.append(undo)
        return before

    def _cell(self, cell: types.CellType) -> None:
        with contextlib.suppress(ValueError):  # it is empty
            content = cell.cell_contents
            self._undo.append(lambda: setattr(cell, "cell_contents", content))
            self._left.append(content)

    def _class(self, cls: type) -> None:
        if is_library(cls.__module__) or is_installed(cls.__module__):
            return
        before = self._named(
            lambda: {name: value for name, value in vars(cls).items() if not _dunder(name)},
            functools.partial(setattr, cls),
            functools.partial(delattr, cls),
        )
        self._left += [vars(cls).get("__call__"), *before.values(), *cls.__bases__]

    def _object(self, value: Any) -> None:
        self._attributes(value)
        self._left.append(type(value))

    def _attributes(self, value: Any) -> None:
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            before = self._named(own.copy, own.__setitem__, own.__delitem__)
            self._left.extend(v for k, v in before.items() if not (isinstance(value, nn.Module) and _hooks(k)))
        for name in {n for cls in type(value).__mro__ for n in _slots(cls)}:
            if hasattr(value, name):
                entry = getattr(value, name)
                self._undo.append(functools.partial(object.__setattr__, value, name, entry))
                self._left.append(entry)


_UNDECLARED = ("running_mean", "running_var")
"""Arguments that batch norms write though their schemas do not say so."""


class _Values:
    """The values that tensors had before code wrote them; shared by threads."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._reached: dict[int, list[torch.Tensor]] = {}
        for tensor in tensors:
            with contextlib.suppress(NotImplementedError, RuntimeError):  # a sparse one has no storage
                self._reached.setdefault(torch_private.storage_id(tensor), []).append(tensor)
        self._before: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._lock = threading.Lock()

    def keep(self, tensor: torch.Tensor) -> None:
        """Copy a tensor's storage, unless that was done or no code reaches it. Call before it is written."""
        key = torch_private.storage_id(tensor) if tensor.layout is torch.strided else 0
        with self._lock:
            if key in self._reached and key not in self._before:
                self._before[key] = [(t, t.detach().clone()) for t in self._reached[key]]

    def put_back(self) -> None:
        with torch.no_grad():
            for kept in self._before.values():
                for tensor, value in kept:
                    tensor.detach().copy_(value)


class _Writes(TorchDispatchMode):
    """Keeps the values of tensors that the operators of a thread are about to write."""

    def __init__(self, kept: _Values) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(torch_private.schema_of(func).arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or argument.name in _UNDECLARED:
                given = args[position] if position < len(args) else kwargs.get(argument.name)
                for tensor in given if isinstance(given, list | tuple) else [given]:
                    if isinstance(tensor, torch.Tensor):
                        self._kept.keep(tensor)
        return func(*args, **kwargs)


def _forget(cached: Any, misses: int) -> None:
    if cached.cache_info().misses != misses:
        cached.cache_clear()


def _items(value: Any) -> Any:
    return value.items() if isinstance(value, dict) else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) == 2:
        return a[0] is b[0] and a[1] is b[1]
    return a is b


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _slots(cls: type) -> list[str]:
    own = [] if is_library(cls.__module__) else cls.__dict__.get("__slots__", ())
    return [own] if isinstance(own, str) else [n for n in own if not _dunder(n)]


def _dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _hooks(name: str) -> bool:
    return name.startswith("_") and "_hooks" in name


def _walked(value: Any) -> bool:
    """Tell whether to look at an object's attributes: a module's, and those of a class of the user's."""
    module = type(value).__module__
    if isinstance(value, nn.Module | types.SimpleNamespace) or module in _HOLDERS:
        return True
    return not isinstance(value, types.ModuleType) and not is_library(module) and not is_installed(module)
