"""Stand-ins for modules: new objects around other tensors, which planning may run in the place of the user's."""

from __future__ import annotations

import contextlib
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from spu.common import torch_private
from spu.common.torch_private import MODULE_HOOKS, MODULE_TABLES

__all__ = ["hooks_off", "stand_in"]

_LIBRARIES = ("torch", "spu")


def stand_in(
    value: Any,
    tensor: Callable[[torch.Tensor], torch.Tensor],
    script: Callable[[torch.jit.ScriptModule], nn.Module] | None = None,
) -> Any:
    """Return a module and what it holds as new objects; tensors and modules that several places share stay shared.

    Lists, dicts and tuples in its attributes are new too, with the modules and tensors in them. Bound methods are bound
    to the new objects. What `torch.compile` has wrapped is taken out of it. The user's hooks do nothing, but are there,
    because fused blocks look for them; torch's own (weight_norm's) stay. All other objects are the original ones.

    Args:
        value: a module, or a method of one. It is not changed, and none of its code runs: it need not be copyable.
        tensor: ``tensor(original)`` -> what to put in its place.
        script: makes the stand-in of a TorchScript module, whose tensors are out of reach.

    Raises:
        TypeError: there is a TorchScript module, and no ``script``.
    """
    return _Copier(tensor, script).value(value)


class _Copier:
    def __init__(
        self,
        tensor: Callable[[torch.Tensor], torch.Tensor],
        script: Callable[[torch.jit.ScriptModule], nn.Module] | None,
    ) -> None:
        self._make, self._script = tensor, script
        # By id: the original, which keeps its id from being reused, and the copy.
        self._made: dict[int, tuple[Any, Any]] = {}

    def module(self, source: nn.Module) -> nn.Module:
        if id(source) in self._made:
            return self._made[id(source)][1]
        if isinstance(source, torch.jit.ScriptModule):
            if self._script is None:
                raise TypeError(f"{type(source).__name__} is TorchScript, which runs on real tensors only")
            made = self._script(source)
        elif (inner := torch_private.inner_of_compiled(source)) is not None:
            made = self.module(inner)
        else:
            made = object.__new__(type(source))  # a GraphModule's __new__ would make a new class without its code
            self._made[id(source)] = source, made
            self._fill(made, source)
        self._made[id(source)] = source, made
        return made

    def _fill(self, made: nn.Module, source: nn.Module) -> None:
        own = made.__dict__
        own.update(source.__dict__)
        for name in MODULE_TABLES:
            own[name] = {key: self.value(entry) for key, entry in source.__dict__[name].items()}
        torch_private.swap_compiled_call(made)
        for name in MODULE_HOOKS:
            own[name] = OrderedDict((key, _quiet(hook)) for key, hook in source.__dict__.get(name, {}).items())
        for name in source.__dict__:
            if name not in MODULE_TABLES and name not in MODULE_HOOKS:
                own[name] = self.value(own[name])

    def value(self, value: Any) -> Any:
        """Return what replaces an attribute, or an entry of one."""
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.module(value.__self__))
        if type(value) not in (list, dict, tuple, OrderedDict):
            return value
        if id(value) not in self._made:
            if type(value) is tuple:
                self._made[id(value)] = value, tuple(self.value(entry) for entry in value)
            else:
                made = type(value)()
                self._made[id(value)] = value, made
                if isinstance(value, dict):
                    made.update((key, self.value(entry)) for key, entry in value.items())
                else:
                    made.extend(self.value(entry) for entry in value)
        return self._made[id(value)][1]

    def tensor(self, source: torch.Tensor) -> torch.Tensor:
        if id(source) not in self._made:
            made = self._make(source)
            if isinstance(source, nn.Parameter) and not isinstance(made, nn.Parameter):
                made = nn.Parameter(made.detach(), requires_grad=source.requires_grad)
            self._made[id(source)] = source, made
        return self._made[id(source)][1]


def _quiet(hook: Any) -> Any:
    """Return the hook if it is a library's, else one that does nothing."""
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return hook if module.split(".")[0] in _LIBRARIES else lambda *args, **kwargs: None


@contextlib.contextmanager
def hooks_off(*modules: nn.Module) -> Iterator[None]:
    """Replace the user's hooks by ones that do nothing: those on these modules and their children, and global ones."""
    owners = [vars(part) for module in modules for part in module.modules()]
    tables = torch_private.global_hook_tables()
    tables += [owner[name] for owner in owners for name in MODULE_HOOKS if owner.get(name)]
    before = [dict(table) for table in tables]
    try:
        for table in tables:
            table.update({key: _quiet(hook) for key, hook in table.items()})
        yield
    finally:
        for table, own in zip(tables, before):
            table.update({key: hook for key, hook in own.items() if key in table})
