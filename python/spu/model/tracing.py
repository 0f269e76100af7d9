"""A `torch.fx` tracer that records what happens between modules, and stops where a record would not be exact."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import fx, nn

from spu.common import torch_private

__all__ = ["Retry", "Tracer", "Untraceable", "atoms_of", "is_chain"]

_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_LONG = 4


class Untraceable(Exception):
    """A forward that cannot be recorded exactly; the text says why."""


class Retry(Untraceable):
    """A module must not be looked into; trace once more without."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Tracer(fx.Tracer):
    """Records a model's forward, as child ``model`` of the root.

    Args:
        whole: names of the modules, in the model, that are not looked into.
        all_the_way: look also into modules that are no chains (below), as far as their own code goes.

    Attributes:
        opened: modules that were looked into, by name.
        problem: why the record is not exact; "" for nothing found.
    """

    proxy_buffer_attributes = True

    def __init__(self, whole: Container[str], all_the_way: bool = False) -> None:
        super().__init__()
        self._whole, self._all_the_way = whole, all_the_way
        self._thread = threading.get_ident()  # fx patches torch for all threads
        self._modes = _modes()
        self.opened: dict[str, nn.Module] = {}
        self.problem = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module is called whole."""
        name = module_qualified_name.partition(".")[2]
        closed = name in self._whole or has_hooks(m) or _has_own_state(m)
        return bool(name) and (closed or not _is_opened(m, self._all_the_way))

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call of a module, or what it does if it is looked into."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        name = path.partition(".")[2]
        if name and overrides_call(type(m)):
            raise Untraceable(f"module {name!r} ({type(m).__name__}) has a __call__ of its own")
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        if has_hooks(m):
            raise Untraceable("it has a hook, but a pipeline never calls the whole: register it on a module in it")
        if _has_own_state(m):
            raise Untraceable("it keeps a state of its own (get_extra_state): keep it in a module in it")
        self.opened[name] = m
        try:
            return super().call_module(m, forward, args, kwargs)
        except Retry:
            raise
        except Exception as error:
            if name:
                raise Retry(name) from error
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Record the use of a parameter or buffer."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node to the graph."""
        if _modes() != self._modes:
            raise self._noted("its forward switches gradients, inference mode or autocast on or off between modules")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Return what stands for an argument in the graph."""
        if isinstance(a, torch.Tensor):
            owned = [*self.root.named_parameters(), *self.root.named_buffers()]
            if not any(a is tensor for _, tensor in owned):
                raise self._noted(
                    "its forward makes or holds a tensor that is no parameter, no buffer, and made from none of its "
                    "inputs (torch.rand, torch.arange): register it as a buffer"
                )
        return super().create_arg(a)

    def _noted(self, problem: str) -> Untraceable:
        """Return an error that counts even where the user's code catches it."""
        if not self.problem:
            self.problem = problem
        return Untraceable(problem)

    @contextlib.contextmanager
    def unchanged(self, model: nn.Module) -> Iterator[None]:
        """Note as a problem if the code in the block draws random numbers, or changes a module that is looked into."""
        drawn, before = _generators(), {id(m): _contents(m) for m in model.modules()}
        yield
        if self.problem:
            return
        if _generators() != drawn:
            self.problem = "its forward draws random numbers between modules, which a trace would draw once"
        for name, module in self.opened.items():
            if _contents(module) != before.get(id(module)):
                self.problem = f"its forward changes attributes of {f'module {name!r}' if name else 'the model'}"


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module has forward or backward hooks."""
    return any(getattr(module, hooks, None) for hooks in torch_private.MODULE_HOOKS)


def _has_own_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def overrides_call(cls: type) -> bool:
    """Tell whether a module class, or one it is derived from, defines ``__call__``."""
    return any("__call__" in vars(base) for base in cls.__mro__[: cls.__mro__.index(nn.Module)])


def is_chain(module: nn.Module) -> bool:
    """Tell whether a module is a list of blocks, or a long sequence of layers with parameters."""
    if not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    children = list(module.children())
    blocks = sum(any(True for _ in child.children()) for child in children)
    return blocks > 1 or sum(any(True for _ in child.parameters()) for child in children) >= _LONG


def _is_opened(module: nn.Module, all_the_way: bool) -> bool:
    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential):
        return False
    if hasattr(type(module), "spu_plain"):  # fused, by a trainer or by the user
        return False
    if isinstance(module, torch.jit.ScriptModule) or torch_private.inner_of_compiled(module) is not None:
        return False
    if all_the_way and sum(any(True for _ in child.parameters()) for child in module.children()) > 0:
        return True
    return any(is_chain(part) for part in module.modules())


def _modes() -> tuple[Any, ...]:
    kinds = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds),
        torch.get_default_dtype(),
    )


def _generators() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    numbers = repr(numpy.random.get_state(legacy=False)["state"]) if numpy is not None else ""
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numbers


def atoms_of(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes that are plain values, but for its mode."""
    return {k: v for k, v in vars(module).items() if k != "training" and isinstance(v, _ATOMS)}


def _contents(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes: plain values, what containers hold, and the identity of everything else."""
    found: dict[str, Any] = dict(atoms_of(module))
    for key, value in vars(module).items():
        if isinstance(value, dict):
            found[key] = [(k, id(v)) for k, v in value.items()]
        elif isinstance(value, (list, tuple, set)):
            found[key] = list(map(id, value))
        elif key not in found and key != "training":
            found[key] = id(value)
    return found
