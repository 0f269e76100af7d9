"""The fp32 master of a 16-bit weight as the weight and a correction: the definition of ``csrc/math/masters.h``.

Take the format X that has the weight's exponent and, below its mantissa, B more bits: B = 16 for a ``"16bit"``
master, 8 for an ``"8bit"`` one. The pattern of a magnitude in X is an integer, ``size``, which grows with the value.
Its upper bits, rounded to nearest, are the weight's pattern; the correction, a signed integer of B bits, is the rest::

    size = (weight's pattern without its sign) * 2**B + correction

====== ===== ============================ ======================================================================
weight B     X: exponent + mantissa bits   the master that is kept
====== ===== ============================ ======================================================================
bf16   16    8 + 23, fp32 itself          every fp32 value, exactly
fp16   16    5 + 26, unit 2**-40 at least exact for magnitudes of 2**-16 to 65,567; below, a multiple of 2**-40
bf16   8     8 + 15                       15 mantissa bits
fp16   8     5 + 18, unit 2**-32 at least 18 mantissa bits from 2**-14 on; below, a multiple of 2**-32
====== ===== ============================ ======================================================================

A master beyond fp16's range, infinity too, becomes 65,567 (its weight is infinite, as beside an fp32 master). NaN
stays NaN. What a ``"16bit"`` master does not hold exactly is rounded to nearest. An ``"8bit"`` one is rounded
stochastically in a step, by bits of the hash that rounds the moments, so that updates smaller than its unit count on
average.

A master halfway between two weights: fp16 with B = 16 rounds it to even, as fp32 masters are rounded. Its size is a
multiple of 8, so that the correction 2**15, which does not fit, can be 2**15 - 1. (Below 2**-16 that is a unit less
than the master.) The others have no such code to spare, and round the weight away from zero there: one weight in 2**17
(bf16, B = 16) or in 2**9 (B = 8) is the other neighbour, equally near. The master is not touched by that.

The idea, a 16-bit weight with a correction for its master, is FlashOptim's (arXiv:2602.23349); the encoding is ours.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spu.common.dtypes import HALVES

__all__ = ["MASTERS", "correction_dtype", "joined", "master_noise", "masters_of", "split"]

MASTERS = ("fp32", "16bit", "8bit")
_DTYPES = {"fp32": torch.float32, "16bit": torch.int16, "8bit": torch.int8}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_INFINITY, _FP16_INFINITY, _BF16_INFINITY = 0x7F800000, 0x7C00, 0x7F80
_BIAS = 112 << 23  # an exponent of fp16 in the place of fp32's
_SMALLEST_NORMAL = 113 << 23  # 2**-14
_LARGEST = 0x47800FFF  # the fp32 pattern of 65,567.99: the last that X of fp16 rounds to infinity's weight
_PIECE = 1 << 17  # values that are worked on at a time: each takes some 30 bytes meanwhile, which a core's cache holds


def correction_dtype(master: str) -> torch.dtype:
    """Return the dtype of a correction: int16 or int8.

    Raises:
        ValueError: "fp32", which has none, or no form at all.
    """
    if master not in MASTERS[1:]:
        raise ValueError(f"a {master!r} master has no correction: only {MASTERS[1]!r} and {MASTERS[2]!r} have one")
    return _DTYPES[master]


def masters_of(kept: Tensor) -> str:
    """Return the name in ``MASTERS`` for a tensor: a master or a correction. Raise KeyError for another dtype."""
    return _NAMES[kept.dtype]


def master_noise(bits: Tensor) -> Tensor:
    """Return the 8 of 32 random bits that round an 8-bit correction: the least for the first moment or the second."""
    return (bits >> 12) & 0xFF


def joined(weight: Tensor, correction: Tensor) -> Tensor:
    """Return the fp32 master of an fp16 or bf16 weight and its correction.

    A weight that somebody has written since is joined with the old correction: the value is at most half a unit in the
    weight's last place from what was written. NaN gives NaN, a 0 with a negative correction 0.
    """
    if weight.numel() <= _PIECE:
        return _joined(weight, correction)
    value = torch.empty_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
    for into, *piece in _pieces(value, weight, correction):
        into.copy_(_joined(*piece))
    return value


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of tensors of one shape, `_PIECE` values at a time; rows at least, where one is not contiguous."""
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = tuple(tensor.view(-1) for tensor in tensors)
    rows = tensors[0].shape[0]
    return zip(*(tensor.split(max(1, _PIECE * rows // tensor.numel())) for tensor in tensors), strict=True)


def _joined(weight: Tensor, correction: Tensor) -> Tensor:
    bits = 8 * correction.dtype.itemsize
    pattern = weight.view(torch.int16).to(torch.int32) & 0xFFFF
    magnitude = pattern & 0x7FFF
    size = ((magnitude << bits) + correction.to(torch.int32)).clamp(min=0)
    if weight.dtype == torch.bfloat16:
        value = _floats((size << (16 - bits)).clamp(max=_INFINITY))
        limit = _BF16_INFINITY
    else:
        # fp32 keeps the upper 23 of X's mantissa bits; the rest are 0, or 1s that stand for one more
        wide = (size + 1) >> 3 if bits == 16 else size << 5
        tiny = size < (1 << (10 + bits))
        value = torch.where(tiny, size.float() * 2.0 ** -(24 + bits), _floats(wide + _BIAS))
        limit = _FP16_INFINITY
    value = torch.where(magnitude > limit, torch.nan, value)
    return torch.where(pattern > 0x7FFF, -value, value)


def _floats(pattern: Tensor) -> Tensor:
    return pattern.view(torch.float32)


def split(master: Tensor, dtype: torch.dtype, form: str, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (weight, correction) of a master.

    Args:
        master: fp32; of another dtype, it is taken in fp32.
        dtype: the weight's, fp16 or bf16.
        form: "16bit" or "8bit".
        noise: int64, 8 random bits for each value, in any shape: rounds an "8bit" master stochastically; None: to
            nearest. "16bit" is always rounded to nearest.
    """
    assert dtype in HALVES
    kind = correction_dtype(form)
    if noise is not None or master.numel() <= _PIECE:
        return _split(master, dtype, kind, noise)
    both = [torch.empty(master.shape, dtype=own, device=master.device) for own in (dtype, kind)]
    for piece, *into in _pieces(master, *both):
        for own, value in zip(into, _split(piece, dtype, kind, None), strict=True):
            own.copy_(value)
    return both[0], both[1]


def _split(master: Tensor, dtype: torch.dtype, kind: torch.dtype, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    bits = 8 * kind.itemsize
    # int32 holds every size, and sums that pass it are of NaN
    pattern = master.to(torch.float32).contiguous().view(torch.int32)
    magnitude = pattern & 0x7FFFFFFF
    random = torch.full_like(magnitude, 0x80) if noise is None else noise.reshape(magnitude.shape).to(torch.int32)
    sizes = _sizes_of_bf16 if dtype == torch.bfloat16 else _sizes_of_fp16
    size = sizes(magnitude, bits, random)
    half = 1 << (bits - 1)
    even = dtype == torch.float16 and bits == 16
    upper = (size + (half - 1 + ((size >> bits) & 1) if even else half)) >> bits
    rest = (size - (upper << bits)).clamp(max=half - 1)
    is_nan = magnitude > _INFINITY
    upper = torch.where(is_nan, 0x7FC0 if dtype == torch.bfloat16 else 0x7E00, upper) | ((pattern >> 16) & 0x8000)
    return upper.to(torch.int16).view(dtype), torch.where(is_nan, 0, rest).to(kind)


def _sizes_of_bf16(magnitude: Tensor, bits: int, noise: Tensor) -> Tensor:
    if bits == 16:
        return magnitude
    raised = magnitude + noise
    return torch.where(raised < _INFINITY, raised, magnitude) >> 8  # nothing finite becomes infinite


def _sizes_of_fp16(magnitude: Tensor, bits: int, noise: Tensor) -> Tensor:
    magnitude = magnitude.clamp(max=_LARGEST)
    units = (_floats(magnitude) * 2.0**40).clamp(max=2.0**27).round().to(torch.int32)  # of 2**-40, used below 2**-14
    normal = magnitude - _BIAS
    if bits == 16:
        return torch.where(magnitude < _SMALLEST_NORMAL, units, normal << 3)
    size = torch.where(magnitude < _SMALLEST_NORMAL, (units + noise) >> 8, (normal + (noise >> 3)) >> 5)
    return size.clamp(max=(_FP16_INFINITY << 8) + 0x7F)
