"""Packing and unpacking of the sections of a wire: fp32 scales, then payload, each padded with zeros to 64 bytes.

The 64-byte header belongs to the format's owner (``spu.common.wire``) and is passed in: it is made of static facts, and
no kernel reads it. A block's scale is absmax / (largest code); a scale below fp32's normal range counts as 0; a block
with a non-finite value stores a NaN scale and so decodes to NaN. fp8 is coded by integer arithmetic, so that every
architecture and the interpreter give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spu.kernels.arith import narrow, nonfinite, widen
from spu.kernels.kept import Launcher
from spu.kernels.launch import POINTWISE, ceil_div

HEADER_BYTES = 64
ALIGN_BYTES = 64
CONVERT_SIZE = 1024
SOURCE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Format(NamedTuple):
    """A codec: the payload's dtype, values a block (0: no scales), magnitude of the largest code, blocks a program."""

    payload: torch.dtype
    block: int = 0
    largest: float = 0.0
    blocks_per_program: int = 16


FORMATS = {
    "fp16": Format(torch.float16),
    "bf16": Format(torch.bfloat16),
    "int8": Format(torch.int8, 64, 127.0),
    "int4": Format(torch.uint8, 32, 7.0, 32),
    "fp8_e4m3": Format(torch.uint8, 64, 448.0),
    "fp8_e5m2": Format(torch.uint8, 64, 57344.0),
}


@triton.jit
def _fp8_code(value, LARGEST: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Return the 8 bits of fp32 ``value`` to nearest even, saturating. A subnormal is rounded by adding a power of two
    whose last place is that of subnormals.
    """
    bits = value.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), LARGEST)
    bits = size.to(tl.uint32, bitcast=True)
    drop: tl.constexpr = 23 - MANTISSA
    rounded = (bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop
    normal = rounded - ((127 - BIAS) << MANTISSA)
    magic: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
    pushed = size + tl.full(size.shape, magic, tl.uint32).to(tl.float32, bitcast=True)
    tiny = pushed.to(tl.uint32, bitcast=True) - magic
    return (sign | tl.where(bits < ((128 - BIAS) << 23), tiny, normal)).to(tl.uint8)


@triton.jit
def _fp8_value(code, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Return the fp32 value of finite fp8 codes."""
    code = code.to(tl.uint32)
    sign = (code & 0x80) << 24
    size = (code & 0x7F) << (23 - MANTISSA)
    smallest: tl.constexpr = (128 - BIAS) << 23
    least = tl.full(size.shape, smallest, tl.uint32).to(tl.float32, bitcast=True)
    tiny = (size + smallest).to(tl.float32, bitcast=True) - least
    bits = tl.where(size < (1 << 23), tiny.to(tl.uint32, bitcast=True), size + ((127 - BIAS) << 23))
    return (bits | sign).to(tl.float32, bitcast=True)


@triton.jit
def quantize_kernel(
    x, header, wire, scales, payload, numel, blocks, slots,
    CODEC: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr, PER: tl.constexpr, HEADER: tl.constexpr,
):  # fmt: skip
    """Turn x [numel] into scales fp32 [slots] and codes for ``blocks`` blocks of the padded payload."""
    if tl.program_id(0) == 0:
        lanes = tl.arange(0, HEADER)
        tl.store(wire + lanes, tl.load(header + lanes))
    block = tl.program_id(0).to(tl.int64) * PER + tl.arange(0, PER)
    offsets = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [PER, BLOCK]
    values = widen(tl.load(x + offsets, mask=offsets < numel, other=0.0))
    bad = tl.max(nonfinite(values).to(tl.int32), 1) > 0
    scale = tl.math.div_rn(tl.max(tl.abs(values), 1), tl.full((PER,), LARGEST, tl.float32))
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)
    usable = (scale > 0.0) & (bad == 0)
    divisor = tl.where(usable, scale, 1.0)[:, None] + tl.zeros((PER, BLOCK), tl.float32)
    quotient = tl.math.div_rn(tl.where(usable[:, None], values, 0.0), divisor)
    tl.store(scales + block, tl.where(bad, float("nan"), scale), mask=block < slots)
    inside = (block < blocks)[:, None]
    if CODEC == "fp8_e4m3":
        tl.store(payload + offsets, _fp8_code(quotient, LARGEST, 3, 7), mask=inside)
    elif CODEC == "fp8_e5m2":
        tl.store(payload + offsets, _fp8_code(quotient, LARGEST, 2, 15), mask=inside)
    else:
        # Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even, on every machine.
        code = (quotient + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(code, -LARGEST), LARGEST)
        if CODEC == "int8":
            tl.store(payload + offsets, code.to(tl.int8), mask=inside)
        else:
            low, high = tl.split(tl.reshape(code.to(tl.int32), (PER, BLOCK // 2, 2)))
            pair = (low & 15) | ((high & 15) << 4)
            at = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
            tl.store(payload + at, pair.to(tl.uint8), mask=inside)


@triton.jit
def dequantize_kernel(
    scales, payload, out, numel, CODEC: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Compute out [numel] = codes times their block's scale."""
    offsets = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = offsets < numel
    scale = tl.load(scales + offsets // BLOCK, mask=inside, other=0.0)
    if CODEC == "int4":
        at = tl.program_id(0).to(tl.int64) * (SIZE // 2) + tl.arange(0, SIZE // 2)
        pair = tl.load(payload + at, mask=2 * at < numel, other=0).to(tl.int32)
        nibble = tl.interleave(pair & 15, pair >> 4)
        code = ((nibble ^ 8) - 8).to(tl.float32)
    else:
        stored = tl.load(payload + offsets, mask=inside, other=0)
        if CODEC == "fp8_e4m3":
            code = _fp8_value(stored, 3, 7)
        elif CODEC == "fp8_e5m2":
            code = _fp8_value(stored, 2, 15)
        else:
            code = stored.to(tl.float32)
    tl.store(out + offsets, narrow(code * scale, out.dtype.element_ty), mask=inside)


@triton.jit
def convert_kernel(
    source, header, wire, target, numel, target_numel, WITH_HEADER: tl.constexpr, SIZE: tl.constexpr,
    HEADER: tl.constexpr,
):  # fmt: skip
    """Compute target[i] = source[i] in target's dtype; 0 in the padding numel <= i < target_numel."""
    if WITH_HEADER and tl.program_id(0) == 0:
        lanes = tl.arange(0, HEADER)
        tl.store(wire + lanes, tl.load(header + lanes))
    offsets = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    values = widen(tl.load(source + offsets, mask=offsets < numel, other=0.0))
    tl.store(target + offsets, narrow(values, target.dtype.element_ty), mask=offsets < target_numel)


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES


@lru_cache(maxsize=4096)
def sections(numel: int, codec: str) -> tuple[Format, int, int]:
    """Return (format, bytes of scales, bytes of payload), both padded."""
    if codec not in FORMATS:
        raise ValueError(f"unknown codec {codec!r}: use one of {', '.join(FORMATS)}")
    found = FORMATS[codec]
    scales = 4 * -(-numel // found.block) if found.block else 0
    payload = (numel + 1) // 2 if codec == "int4" else found.payload.itemsize * numel
    return found, _padded(scales), _padded(payload)


@lru_cache(maxsize=1024)
def _header_on(header: bytes, device: torch.device) -> Tensor:
    """Return the header on a device: copied there once, since a copy from the host costs more than a small pack."""
    return torch.frombuffer(bytearray(header), dtype=torch.uint8).to(device)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in SOURCE_DTYPES:
        raise TypeError(f"a wire holds float16, bfloat16 or float32, not {dtype}: convert with .to() first")


_QUANTIZE, _DEQUANTIZE = Launcher(quantize_kernel, POINTWISE), Launcher(dequantize_kernel, POINTWISE)
_CONVERT = Launcher(convert_kernel, POINTWISE)


def pack(x: Tensor, codec: str, header: bytes) -> Tensor:
    """Encode a tensor of any shape and strides, in one launch.

    Args:
        x: fp16, bf16 or fp32.
        codec: one of ``FORMATS``.
        header: the wire's first 64 bytes, stored as they are.

    Returns:
        uint8 [64 + scales + payload], on x's device.

    Raises:
        ValueError: unknown codec, or a header of another length.
        TypeError: another dtype.
    """
    _check_dtype(x.dtype)
    if len(header) != HEADER_BYTES:
        raise ValueError(f"a wire header has {HEADER_BYTES} bytes, this one has {len(header)}")
    numel = x.numel()
    found, scales_bytes, payload_bytes = sections(numel, codec)
    wire = torch.empty(HEADER_BYTES + scales_bytes + payload_bytes, dtype=torch.uint8, device=x.device)
    head = _header_on(header, x.device)
    if numel == 0:
        return wire.copy_(head)
    flat = x.contiguous().view(-1)
    payload = wire[HEADER_BYTES + scales_bytes :].view(found.payload)
    if found.block:
        scales = wire[HEADER_BYTES : HEADER_BYTES + scales_bytes].view(torch.float32)
        slots, block_bytes = scales.numel(), found.block // 2 if codec == "int4" else found.block
        blocks = payload_bytes // block_bytes
        grid = (ceil_div(max(slots, blocks), found.blocks_per_program),)
        _QUANTIZE(
            grid,
            (flat, head, wire, scales, payload),
            (numel, blocks, slots, codec, found.largest, found.block, found.blocks_per_program, HEADER_BYTES),
        )
    else:
        grid = (ceil_div(payload.numel(), CONVERT_SIZE),)
        fixed = numel, payload.numel(), True, CONVERT_SIZE, HEADER_BYTES
        _CONVERT(grid, (flat, head, wire, payload), fixed)
    return wire


def unpack(wire: Tensor, shape: Sequence[int], dtype: torch.dtype, codec: str) -> Tensor:
    """Decode the result of ``pack`` without a look at any value of the header.

    Args:
        wire: uint8, contiguous.
        shape: of the packed tensor.
        dtype: of the result: fp16, bf16 or fp32.
        codec: what it was packed with.

    Raises:
        ValueError: unknown codec, or a wire of the wrong size.
        TypeError: another dtype.
    """
    _check_dtype(dtype)
    numel = math.prod(shape)
    found, scales_bytes, payload_bytes = sections(numel, codec)
    expected = HEADER_BYTES + scales_bytes + payload_bytes
    if wire.dtype != torch.uint8 or wire.shape != (expected,):
        raise ValueError(
            f"a {codec} wire of shape {tuple(shape)} is uint8 [{expected}], this is {wire.dtype} {list(wire.shape)}"
        )
    out = torch.empty(tuple(shape), dtype=dtype, device=wire.device)
    if numel == 0:
        return out
    if wire.storage_offset() % 4 or not wire.is_contiguous():
        wire = wire.clone(memory_format=torch.contiguous_format)  # views of wider types need aligned bytes
    payload = wire[HEADER_BYTES + scales_bytes :].view(found.payload)
    grid = (ceil_div(numel, CONVERT_SIZE),)
    if found.block:
        scales = wire[HEADER_BYTES : HEADER_BYTES + scales_bytes].view(torch.float32)
        _DEQUANTIZE(grid, (scales, payload, out), (numel, codec, found.block, CONVERT_SIZE))
    else:
        _CONVERT(grid, (payload, wire, wire, out), (numel, numel, False, CONVERT_SIZE, HEADER_BYTES))
    return out
