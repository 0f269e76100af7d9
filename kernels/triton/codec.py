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

from spu.kernels.arith import INTERPRET, narrow, widen
from spu.kernels.kept import Launcher
from spu.kernels.launch import POINTWISE, ceil_div, keep_for_graphs

HEADER_BYTES = 64
ALIGN_BYTES = 64
CONVERT_SIZE = 1024
FUSED = not INTERPRET  # the interpreter multiplies and adds with a rounding each
SOURCE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Format(NamedTuple):
    """A codec: the payload's dtype, values a block (0: no scales), magnitude of the largest code, blocks a program."""

    payload: torch.dtype
    block: int = 0
    largest: float = 0.0
    blocks_per_program: int = 64


FORMATS = {
    "fp16": Format(torch.float16),
    "bf16": Format(torch.bfloat16),
    "int8": Format(torch.int8, 64, 127.0),
    "int4": Format(torch.uint8, 32, 7.0, 128),
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
def _quotient(value, scale, inverse, FUSED: tl.constexpr):
    """Return value / scale, rounded as by a division; ``inverse`` is 1 / scale, rounded.

    FUSED: five instructions (Markstein, IBM J. Res. Dev. 34, 1990): value * inverse is off by less than 1.5 units in
    the last place, the first correction leaves a neighbour of the quotient, and from there the second one rounds as a
    division does, since its remainder is exact: |value| <= 128 * scale, and scale >= 2^-64. A division takes twelve.
    """
    if FUSED:
        q = value * inverse
        q = tl.fma(tl.fma(-q, scale, value), inverse, q)
        return tl.fma(tl.fma(-q, scale, value), inverse, q)
    else:
        return tl.math.div_rn(value, scale + tl.zeros(value.shape, tl.float32))


@triton.jit
def _quantize(
    x, scales, payload, block, numel, blocks, slots, WHOLE: tl.constexpr, FUSED: tl.constexpr,
    CODEC: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """Code the blocks ``block`` [PER]; WHOLE: all of their values are there, and no access needs a mask."""
    offsets = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [PER, BLOCK]
    if WHOLE:
        values = widen(tl.load(x + offsets))
    else:
        values = widen(tl.load(x + offsets, mask=offsets < numel, other=0.0))
    # As an integer the largest magnitude also tells whether a value is infinite or NaN.
    top = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    bad = top >= 0x7F800000
    scale = tl.math.div_rn(top.to(tl.float32, bitcast=True), tl.full((PER,), LARGEST, tl.float32))
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)
    usable = (scale > 0.0) & (top < 0x7F800000)
    stored = tl.where(bad, float("nan"), scale)
    divisor = tl.where(usable, scale, 1.0)
    values = tl.where(usable[:, None], values, 0.0)
    inside = (block < blocks)[:, None]
    if WHOLE:
        tl.store(scales + block, stored)
    else:
        tl.store(scales + block, stored, mask=block < slots)
    if CODEC == "fp8_e4m3" or CODEC == "fp8_e5m2":  # which keep a zero's sign: divided
        quotient = tl.math.div_rn(values, divisor[:, None] + tl.zeros((PER, BLOCK), tl.float32))
        if CODEC == "fp8_e4m3":
            code = _fp8_code(quotient, LARGEST, 3, 7)
        else:
            code = _fp8_code(quotient, LARGEST, 2, 15)
        if WHOLE:
            tl.store(payload + offsets, code)
        else:
            tl.store(payload + offsets, code, mask=inside)
    else:
        if FUSED and x.dtype.element_ty != tl.float16:  # fp16's smallest scale is 2^-31
            lift = tl.where(divisor < 5.421010862427522e-20, 18446744073709551616.0, 1.0)  # 2^-64, 2^64
            divisor *= lift
            values *= lift[:, None]
        inverse = tl.math.div_rn(tl.full((PER,), 1.0, tl.float32), divisor)
        quotient = _quotient(values, divisor[:, None], inverse[:, None], FUSED)
        # Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, on every machine, and leaves it in the sum's
        # last bits. No code is beyond the largest: a scale is off by 2^-24 of it at most.
        code = (quotient + 12582912.0).to(tl.int32, bitcast=True)
        if CODEC == "int8":
            if WHOLE:
                tl.store(payload + offsets, code.to(tl.int8))
            else:
                tl.store(payload + offsets, code.to(tl.int8), mask=inside)
        else:
            low, high = tl.split(tl.reshape(code, (PER, BLOCK // 2, 2)))
            pair = ((low & 15) | ((high & 15) << 4)).to(tl.uint8)
            at = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
            if WHOLE:
                tl.store(payload + at, pair)
            else:
                tl.store(payload + at, pair, mask=inside)


@triton.jit
def quantize_kernel(
    x, header, wire, scales, payload, numel, blocks, slots, FUSED: tl.constexpr,
    CODEC: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr, PER: tl.constexpr, HEADER: tl.constexpr,
):  # fmt: skip
    """Turn x [numel] into scales fp32 [slots] and codes for ``blocks`` blocks of the padded payload."""
    if tl.program_id(0) == 0:
        lanes = tl.arange(0, HEADER)
        tl.store(wire + lanes, tl.load(header + lanes))
    first = tl.program_id(0).to(tl.int64) * PER
    block = first + tl.arange(0, PER)
    if (first + PER) * BLOCK <= numel:
        _quantize(x, scales, payload, block, numel, blocks, slots, True, FUSED, CODEC, LARGEST, BLOCK, PER)
    else:
        _quantize(x, scales, payload, block, numel, blocks, slots, False, FUSED, CODEC, LARGEST, BLOCK, PER)


@triton.jit
def _dequantize(
    scales, payload, out, block, numel, WHOLE: tl.constexpr, CODEC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    offsets = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [PER, BLOCK]
    at = offsets
    if CODEC == "int4":
        at = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    if WHOLE:
        scale = tl.load(scales + block)
        stored = tl.load(payload + at)
    else:
        scale = tl.load(scales + block, mask=block * BLOCK < numel, other=0.0)
        stored = tl.load(payload + at, mask=(at * 2 if CODEC == "int4" else at) < numel, other=0)
    if CODEC == "int4":
        pair = stored.to(tl.int32)
        code = ((tl.interleave(pair & 15, pair >> 4) ^ 8) - 8).to(tl.float32)
    elif CODEC == "fp8_e4m3":
        code = _fp8_value(stored, 3, 7)
    elif CODEC == "fp8_e5m2":
        code = _fp8_value(stored, 2, 15)
    else:
        code = stored.to(tl.float32)
    value = narrow(code * scale[:, None], out.dtype.element_ty)
    if WHOLE:
        tl.store(out + offsets, value)
    else:
        tl.store(out + offsets, value, mask=offsets < numel)


@triton.jit
def dequantize_kernel(
    scales, payload, out, numel, CODEC: tl.constexpr, BLOCK: tl.constexpr, PER: tl.constexpr
):  # fmt: skip
    """Compute out [numel] = codes times their block's scale."""
    first = tl.program_id(0).to(tl.int64) * PER
    block = first + tl.arange(0, PER)
    if (first + PER) * BLOCK <= numel:
        _dequantize(scales, payload, out, block, numel, True, CODEC, BLOCK)
    else:
        _dequantize(scales, payload, out, block, numel, False, CODEC, BLOCK)


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
    keep_for_graphs(head)
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
            (numel, blocks, slots, FUSED, codec, found.largest, found.block, found.blocks_per_program, HEADER_BYTES),
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
    if found.block:
        # fp32 takes twice the registers: on sm_75 they did not fit
        blocks = found.blocks_per_program // (2 if dtype == torch.float32 else 1)
        scales = wire[HEADER_BYTES : HEADER_BYTES + scales_bytes].view(torch.float32)
        _DEQUANTIZE(
            (ceil_div(numel, found.block * blocks),), (scales, payload, out), (numel, codec, found.block, blocks)
        )
    else:
        grid = (ceil_div(numel, CONVERT_SIZE),)
        _CONVERT(grid, (payload, wire, wire, out), (numel, numel, False, CONVERT_SIZE, HEADER_BYTES))
    return out
