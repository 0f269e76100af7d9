"""Stand-ins: what is in a tensor's place while its values are elsewhere, in a tier below, a file or another process."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["absent", "is_absent", "reads_as_nan"]

_FP32 = struct.pack("<f", math.nan)
_NANS = {
    torch.float64: struct.pack("<d", math.nan),
    torch.float32: _FP32,
    torch.bfloat16: _FP32[2:],
    torch.float16: struct.pack("<e", math.nan),
}


def absent(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return a stand-in for a tensor that is elsewhere: NaN to who reads it, an error to who writes into it.

    It takes the memory of one element. (torch refuses in-place writes where elements share memory.) Integers have no
    NaN: codes of an optimizer's state get a tensor without memory, whose values cannot be read.
    """
    if not dtype.is_floating_point:
        return torch.empty(tuple(shape), dtype=dtype, device="meta")
    return torch.full((1,) * len(shape), float("nan"), dtype=dtype, device=device).expand(tuple(shape))


def reads_as_nan(tensor: Tensor) -> bool:
    """Tell whether the elements of a tensor share one place, which holds a NaN."""
    return _in_one_place(tensor) and math.isnan(tensor.as_strided((), ()).item())


def is_absent(tensor: Tensor) -> bool:
    """Tell whether any tensor, also a fake or sparse one, is a stand-in on the host that `absent` has made.

    It runs no operator, so that it may be asked while torch's fake mode is on.
    """
    nan = _NANS.get(tensor.dtype)
    if nan is None or type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
        return False
    if tensor.layout is not torch.strided or not tensor.numel() or not _in_one_place(tensor):
        return False
    return ctypes.string_at(tensor.data_ptr(), len(nan)) == nan


def _in_one_place(tensor: Tensor) -> bool:
    return all(size == 1 or step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))
