"""AdamW's moments in less memory than fp32, in plain torch: the definition of what ``csrc/math/moments.h`` computes.

``"bf16"`` is a bf16 tensor of the parameter's shape. ``"int8"`` is one uint8 buffer: an fp32 scale for each block of 64
values (its largest magnitude), padded to 64 bytes, then a byte for each value: sign (first moment only), exponent and
leading mantissa bits of value / scale. In a step they are rounded stochastically, by a hash of the step and the
element's index: an average that moves by a thousandth of itself at a step would otherwise stand still.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spu.common.dtypes import DTYPES

__all__ = [
    "MOMENTS",
    "fits",
    "load_moment",
    "moment_bytes",
    "moment_layout",
    "moments_of",
    "new_moment",
    "noise",
    "stored_moment",
]

MOMENTS = ("fp32", "bf16", "int8")
_DTYPES = {name: DTYPES.get(name, torch.uint8) for name in MOMENTS}  # "int8": a buffer of bytes
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLOCK, _ALIGN = 64, 64
_ONE, _INFINITY, _LEAST_SCALE = 0x3F800000, 0x7F800000, 2.0**-126
_WORD = 0xFFFFFFFF


def _scale_bytes(numel: int) -> int:
    return -(-4 * -(-numel // _BLOCK) // _ALIGN) * _ALIGN


def moment_bytes(numel: int) -> int:
    """Return the bytes of an 8-bit moment of ``numel`` values."""
    return _scale_bytes(numel) + numel


def moment_layout(shape: Sequence[int], moments: str) -> tuple[torch.Size, torch.dtype]:
    """Return the shape and the dtype of the tensor that holds a moment of a parameter of a shape.

    Raises:
        ValueError: for a name that is not of ``MOMENTS``.
    """
    if moments not in _DTYPES:
        raise ValueError(f"moments is {moments!r}: choose one of {', '.join(map(repr, MOMENTS))}")
    size = torch.Size(shape)
    return torch.Size([moment_bytes(size.numel())]) if moments == "int8" else size, _DTYPES[moments]


def new_moment(shape: Sequence[int], moments: str, device: torch.device) -> Tensor:
    """Return a moment of zeros for a parameter of a shape; raises as ``moment_layout``."""
    size, dtype = moment_layout(shape, moments)
    return torch.zeros(size, dtype=dtype, device=device)


def moments_of(moment: Tensor) -> str:
    """Return the name in ``MOMENTS`` of a tensor's form. Raise KeyError for another dtype."""
    return _NAMES[moment.dtype]


def fits(moment: Tensor, shape: Sequence[int]) -> bool:
    """Tell whether a tensor is a moment of a parameter of this shape."""
    if moment.dtype == torch.uint8:
        return moment.shape == (moment_bytes(torch.Size(shape).numel()),)
    return moment.dtype in _NAMES and moment.shape == torch.Size(shape)


def noise(numel: int, step: Tensor) -> Tensor:
    """Return int64 [numel] of 32 random bits each: a hash of the step (fp32 [1]) and the element's index."""
    seed = _mixed(step.reshape(1).to(torch.int64) & _WORD)
    return _mixed((torch.arange(numel, device=step.device) * 0x9E3779B9 + seed) & _WORD)


def _mixed(x: Tensor) -> Tensor:
    """Apply the finaliser of A. Appleby's MurmurHash3 to the low 32 bits of int64."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _WORD
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _WORD
    return x ^ (x >> 16)


def load_moment(moment: Tensor, shape: Sequence[int], *, signed: bool) -> Tensor:
    """Return the fp32 values of a moment; the tensor itself if it holds them.

    Args:
        signed: True for the first moment, False for the second.
    """
    if moment.dtype != torch.uint8:
        return moment.float()
    numel = torch.Size(shape).numel()
    split = _scale_bytes(numel)
    scales = moment[: 4 * -(-numel // _BLOCK)].view(torch.float32).repeat_interleave(_BLOCK)[:numel]
    codes = moment[split:].to(torch.int32)
    drop, most = _format(signed)
    size = codes & most
    pattern = torch.where(size == 0, 0, (size + ((_ONE >> drop) - most)) << drop)
    values = pattern.view(torch.float32)
    return (torch.where(codes > most, -values, values) * scales).reshape(tuple(shape))


def _format(signed: bool) -> tuple[int, int]:
    """Return (bits of an fp32 pattern that a code cuts off, the code of 1)."""
    return (20, 127) if signed else (19, 255)


def stored_moment(values: Tensor, moments: str, bits: Tensor | None = None, *, signed: bool) -> Tensor:
    """Return fp32 values in the form of a moment.

    Args:
        bits: int64, 16 random bits for each value, in any shape: rounds stochastically; None: to nearest.
    """
    if moments == "fp32":
        return values
    flat = values.reshape(-1)
    if moments == "bf16":
        return (flat.bfloat16() if bits is None else _bf16(flat, bits.reshape(-1))).reshape(values.shape)
    bits = torch.full_like(flat, 0x8000, dtype=torch.int64) if bits is None else bits.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK)
    scales = blocks.abs().amax(1) if flat.numel() else blocks.new_zeros(0)  # NaN if the block has one
    held = scales.isfinite() if signed else ~scales.isnan()  # squares of finite gradients may be infinite
    scales = torch.where(scales < _LEAST_SCALE, 0.0, torch.where(held, scales, torch.nan))
    spread = scales.repeat_interleave(_BLOCK)[: flat.numel()]
    codes = torch.where(spread > 0, _codes(flat / spread, bits, signed), 0)
    codes = torch.where(spread.isinf(), _format(signed)[1], codes).to(torch.uint8)
    head = scales.view(torch.uint8)
    padding = head.new_zeros(_scale_bytes(flat.numel()) - head.numel())
    return torch.cat((head, padding, codes))


def _bf16(flat: Tensor, bits: Tensor) -> Tensor:
    pattern = flat.view(torch.int32).to(torch.int64)
    magnitude = pattern & 0x7FFFFFFF
    raised = torch.where(magnitude + bits < _INFINITY, pattern + bits, pattern) >> 16
    return torch.where(magnitude < _INFINITY, raised.to(torch.int16).view(torch.bfloat16), flat.bfloat16())


def _codes(share: Tensor, bits: Tensor, signed: bool) -> Tensor:
    drop, most = _format(signed)
    base = (_ONE >> drop) - most
    pattern = share.view(torch.int32).to(torch.int64)
    magnitude = pattern & 0x7FFFFFFF
    normal = ((magnitude + (bits << (drop - 16))) >> drop) - base
    smallest = torch.tensor((base + 1) << drop, dtype=torch.int32, device="cpu").view(torch.float32).item()
    least = smallest * (bits.float() / 65536) if signed else 0.0
    code = torch.where(share.abs() < smallest, (share.abs() > least).to(torch.int64), normal)
    return code | ((pattern >> 24) & 0x80) if signed else code
