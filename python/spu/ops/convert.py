"""Conversions between fp32 and the 16-bit dtypes on a CPU by this library's pass: ``copy_in_``'s kernel.

The values are those of ``.to``. A weight of 512 x 1408 in a decoder's step, fp32 to bf16 into new memory, takes three
quarters of torch's time on a core with AMX; in L2 and into old memory both are as fast.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, compiler, nn

from spu.common.dtypes import STORAGE
from spu.common.tensor_table import TensorTable
from spu.common.torch_private import version
from spu.ops import schema
from spu.ops.dispatch import has_kernel, status_of

__all__ = ["narrowed", "same_weights", "stacked"]

_LEAST = 4096  # values: below, a call costs more than torch's


def _is_ours(x: Tensor) -> bool:
    """Tell whether our pass may read this tensor."""
    return type(x) in (Tensor, nn.Parameter) and x.is_cpu and x.dtype in STORAGE and x.is_contiguous()


def _has_pass() -> bool:
    return status_of("cpu").available and has_kernel("copy_in_", "cpu") and not compiler.is_compiling()


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x.to(dtype)``, where autograd does not record."""
    if x.dtype == dtype:  # what .to says too, in a tenth of its time
        return x
    return _kept((x,), dtype, _converted)


def stacked(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return tensors one below the other, contiguous, in another dtype, where autograd does not record."""
    return _kept(tuple(parts), dtype, _one_below_the_other)


@contextmanager
def same_weights(same: bool = True) -> Iterator[None]:
    """Convert each parameter of a CPU once while the context lasts, not in every forward.

    For a loop of one's own over the microbatches of a step, or over batches of an evaluation, with parameters in fp32
    and ``spu.accelerate(model, "fp16" or "bf16")``. The 16-bit copies are let go of at the end (2 bytes a value; a
    forward and backward holds most of them anyway). A parameter that changes meanwhile is converted again if torch has
    counted the change: an optimizer's step, ``copy_`` under ``no_grad``, other memory in its place. *Values written
    through* ``.data``, *or through an array that shares the memory, are not noticed.*

    Args:
        same: False: convert always, also inside another such context.
    """
    made = _Conversions() if same else None
    token = _CONVERSIONS.set(made)
    try:
        yield
    finally:
        _CONVERSIONS.reset(token)
        if made is not None:
            made.clear()


class _Conversions:
    """Copies of parameters in other dtypes, each with what its parameters were when it was made."""

    def __init__(self) -> None:
        self._rows: TensorTable[dict[Any, tuple[Any, list[weakref.ref[Tensor]], Tensor]]] = TensorTable()

    def of(self, parts: tuple[Tensor, ...], dtype: torch.dtype, make: Callable[..., Tensor]) -> Tensor:
        rows = self._rows.get(parts[0])
        if rows is None:
            rows = self._rows[parts[0]] = {}
        key = dtype, len(parts)
        seen = [(version(part), part.data_ptr(), part.shape, part.stride()) for part in parts]
        row = rows.get(key)
        if row is None or row[0] != seen or any(known() is not part for known, part in zip(row[1], parts, strict=True)):
            row = rows[key] = seen, [weakref.ref(part) for part in parts], make(parts, dtype)
        return row[2]

    def clear(self) -> None:
        self._rows.clear()


_CONVERSIONS: ContextVar[_Conversions | None] = ContextVar("spu_conversions", default=None)


def _kept(parts: tuple[Tensor, ...], dtype: torch.dtype, make: Callable[..., Tensor]) -> Tensor:
    """Return the conversion that is kept, or make one."""
    known = _CONVERSIONS.get()
    if (
        known is None
        or any(type(part) is not nn.Parameter or not part.is_cpu or part.is_inference() for part in parts)
        or torch.is_grad_enabled()  # autograd may record
        or torch.is_inference_mode_enabled()  # its results cannot be used outside it
        or compiler.is_compiling()
    ):
        return make(parts, dtype)
    return known.of(parts, dtype, make)


def _converted(parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    (x,) = parts
    if dtype not in STORAGE or not _is_ours(x) or x.numel() < _LEAST or not _has_pass():
        return x.to(dtype)
    out = x.new_empty(x.shape, dtype=dtype)
    schema.overload("copy_in_", "cpu")([x], [out])
    return out


def _one_below_the_other(parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    first = parts[0]
    out = first.new_empty((sum(part.shape[0] for part in parts), *first.shape[1:]), dtype=dtype)
    targets = list(out.split([part.shape[0] for part in parts]))
    if dtype in STORAGE and all(map(_is_ours, parts)) and _has_pass():
        schema.overload("copy_in_", "cpu")(list(parts), targets)
    else:
        for target, part in zip(targets, parts, strict=True):
            target.copy_(part)
    return out
