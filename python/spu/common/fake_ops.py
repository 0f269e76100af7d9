"""Fake tensors: how they are made, and operators whose fake form refuses what the real one takes."""

from __future__ import annotations

from typing import Any

import torch

from spu.common import torch_private
from spu.common.absent import is_absent
from spu.common.torch_private import FakeTensorMode, TorchDispatchMode, is_fake, tree_map_only

__all__ = ["FakeOps", "fake_copy", "fake_tensor"]


def fake_tensor(mode: FakeTensorMode, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a CPU tensor without data of this one's shape and strides; in ``dtype`` if both are floating."""
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    absent = is_absent(tensor)
    with mode:
        # A sparse one: as many bytes as there can be. One that is elsewhere will not lie in one place.
        if tensor.layout is not torch.strided or absent:
            return torch.empty(tensor.shape, dtype=dtype, device="cpu")
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cpu")


def fake_copy(mode: FakeTensorMode, value: Any) -> Any:
    """Return the structure with fake CPU tensors of the same shapes and dtypes in it."""
    return tree_map_only(torch.Tensor, lambda t: fake_tensor(mode, t).requires_grad_(t.requires_grad), value)


class FakeOps(TorchDispatchMode):
    """Lets a FakeTensorMode run grouped products of every dtype and random draws from a generator, and write to no real
    tensor: the mode itself lets ``add_`` and ``sub_`` of a number through to them.

    Entered after the fake mode and before trackers, so that these count the operator itself, not what stands for it.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("generator") is not None:  # no values, no draws; some fake forms refuse a generator
            kwargs["generator"] = None
        if func is torch_private.grouped_mm() and args[0].dtype != torch.bfloat16:
            # The fake form checks what a kernel for GPUs takes: bf16 alone.
            dtype = kwargs.pop("out_dtype", None) or args[0].dtype
            return func(*map(_as_bfloat16, args), **kwargs).to(dtype)
        schema = torch_private.schema_of(func)
        if not schema.is_mutable or func.overloadpacket is torch.ops.aten.set_:  # copy.deepcopy makes tensors so
            return func(*args, **kwargs)
        stand_ins: list[tuple[torch.Tensor, torch.Tensor]] = []
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        named = zip(schema.arguments, args)
        args = [_spared(arg, stand_ins) if argument.name in written else arg for argument, arg in named]
        kwargs = {name: _spared(arg, stand_ins) if name in written else arg for name, arg in kwargs.items()}
        result = func(*args, **kwargs)
        return next((real for real, fake in stand_ins if result is fake), result)


def _spared(value: Any, stand_ins: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """Return a fake tensor in place of a real one, and add both to ``stand_ins``."""
    if not isinstance(value, torch.Tensor) or is_fake(value) or value.layout is not torch.strided:
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    stand_ins.append((value, made))
    return made


def _as_bfloat16(value: Any) -> Any:
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(torch.bfloat16) if floats else value
