"""Operators whose fake form refuses what the real one takes."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FakeOps"]


class FakeOps(TorchDispatchMode):
    """Inside a FakeTensorMode: grouped products of every dtype, and random draws from a generator.

    Entered after the fake mode and before trackers, so that these count the operator itself, not what stands for it.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("generator") is not None:  # no values, no draws; some fake forms refuse a generator
            kwargs["generator"] = None
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # The fake form checks what a kernel for GPUs takes: bf16 alone.
            dtype = kwargs.pop("out_dtype", None) or args[0].dtype
            return func(*map(_as_bfloat16, args), **kwargs).to(dtype)
        return func(*args, **kwargs)


def _as_bfloat16(value: Any) -> Any:
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(torch.bfloat16) if floats else value
