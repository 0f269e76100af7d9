"""Layers of other processes: their parameters let go of their memory, and refuse to be taken for values.

The model's objects stay, so that shapes and names are known everywhere. In the place of a value stands one NaN
(`spu.common.absent`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from spu.common.absent import absent, is_absent
from spu.common.torch_private import parameters_of
from spu.model.layers import Layer

__all__ = ["check_here", "let_go"]

_GUARDS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def let_go(modules: Iterable[nn.Module], kept: Collection[int] = ()) -> frozenset[int]:
    """Free the memory of floating-point parameters of modules, and refuse by name whoever wants their values.

    Args:
        modules: of layers of other processes.
        kept: ids of parameters that this process uses too.

    Returns:
        The ids of the parameters that are without values now.
    """
    gone: set[int] = set()
    for module in {id(m): m for top in modules for m in top.modules()}.values():
        own = [p for p in parameters_of(module).values() if p is not None]
        own = [p for p in own if p.is_floating_point() and id(p) not in kept]
        for parameter in own:
            parameter.data = absent(parameter.shape, parameter.dtype)
            parameter.grad = None
        gone |= {id(p) for p in own}
        if own:
            _guard(module)
    return frozenset(gone)


def check_here(layers: Sequence[Layer]) -> None:
    """Raise ValueError for a parameter whose values an earlier trainer left to another process."""
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if is_absent(parameter):
                raise ValueError(
                    f"{name} has no values in this process: an earlier trainer of this model had its stage in another "
                    "one; make the model anew, and load() that trainer's checkpoint"
                )
        for module in layer.module.modules():
            for handle in _GUARDS.pop(module, ()):
                handle.remove()


def _guard(module: nn.Module) -> None:
    if module not in _GUARDS:
        _GUARDS[module] = [
            module.register_state_dict_pre_hook(_refuse_state),
            module.register_forward_pre_hook(_refuse_forward),
        ]


def _away(module: nn.Module) -> Iterator[str]:
    """Yield the names of a module's own parameters that are without values."""
    return (name for name, p in parameters_of(module).items() if p is not None and is_absent(p))


def _refuse_state(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    for name in () if keep_vars else _away(module):  # with keep_vars somebody asks for the parameters themselves
        raise RuntimeError(
            f"{prefix}{name} is in a stage of another process, so that its values are not here: take "
            "trainer.state_dict_for_model(), called in every process, or trainer.save()"
        )


def _refuse_forward(module: nn.Module, arguments: Any) -> None:
    for name in _away(module):
        raise RuntimeError(
            f"{type(module).__name__} has its {name} in a stage of another process: evaluate() runs the whole model, "
            "called in every process; or load trainer.state_dict_for_model(), which rank 0 gets, into a new model"
        )
