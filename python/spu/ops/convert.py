"""Conversions between fp32 and the 16-bit dtypes on a CPU by this library's pass: ``copy_in_``'s kernel.

The values are those of ``.to``. A weight of 512 x 1408 in a decoder's step, fp32 to bf16 into new memory, takes three
quarters of torch's time on a core with AMX; in L2 and into old memory both are as fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, compiler, nn

from spu.common.dtypes import STORAGE
from spu.ops import schema
from spu.ops.dispatch import has_kernel, status_of

__all__ = ["narrowed", "stacked"]

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
    if dtype not in STORAGE or not _is_ours(x) or x.numel() < _LEAST or not _has_pass():
        return x.to(dtype)
    out = x.new_empty(x.shape, dtype=dtype)
    schema.overload("copy_in_", "cpu")([x], [out])
    return out


def stacked(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return tensors one below the other, contiguous, in another dtype, where autograd does not record."""
    first = parts[0]
    out = first.new_empty((sum(part.shape[0] for part in parts), *first.shape[1:]), dtype=dtype)
    targets = list(out.split([part.shape[0] for part in parts]))
    if dtype in STORAGE and all(map(_is_ours, parts)) and _has_pass():
        schema.overload("copy_in_", "cpu")(list(parts), targets)
    else:
        for target, part in zip(targets, parts, strict=True):
            target.copy_(part)
    return out
