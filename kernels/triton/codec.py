"""Packing and unpacking of the sections of a wire: fp32 scales, then payload, each padded with zeros to 64 bytes.

The 64-byte header belongs to the format's owner (``spu.ops.wire``) and is passed in: it is made of static facts, and
no kernel reads it. int8 stores blocks of 64 values in contiguous order with scale = absmax / 127; a scale below fp32's
normal range counts as 0; a block with a non-finite value stores a NaN scale and so decodes to NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arith import narrow, nonfinite, widen

HEADER_BYTES = 64
ALIGN_BYTES = 64
BLOCK = tl.constexpr(64)  # values that share an int8 scale
BLOCKS_PER_PROGRAM = 16  # 64 bytes of scales, so that whole programs cover the padding
CONVERT_SIZE = 1024
PAYLOAD_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
SOURCE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _quantize_int8_kernel(x, scales, payload, numel, blocks, PER: tl.constexpr):
    # x [numel]; scales fp32 [blocks rounded up to 16]; payload int8 [blocks * 64]
    block = tl.program_id(0).to(tl.int64) * PER + tl.arange(0, PER)
    offsets = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [PER, 64]
    values = widen(tl.load(x + offsets, mask=offsets < numel, other=0.0))
    bad = tl.max(nonfinite(values).to(tl.int32), 1) > 0
    scale = tl.math.div_rn(tl.max(tl.abs(values), 1), tl.full((PER,), 127.0, tl.float32))
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)
    usable = (scale > 0.0) & (bad == 0)
    divisor = tl.where(usable, scale, 1.0)[:, None] + tl.zeros((PER, BLOCK), tl.float32)
    quotient = tl.math.div_rn(tl.where(usable[:, None], values, 0.0), divisor)
    # Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even, in one rounding mode everywhere.
    code = (quotient + 12582912.0) - 12582912.0
    code = tl.minimum(tl.maximum(code, -127.0), 127.0)
    tl.store(payload + offsets, code.to(tl.int8), mask=(block < blocks)[:, None])
    tl.store(scales + block, tl.where(bad, float("nan"), scale))


@triton.jit
def _dequantize_int8_kernel(scales, payload, out, numel, SIZE: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = offsets < numel
    scale = tl.load(scales + offsets // BLOCK, mask=inside, other=0.0)
    code = tl.load(payload + offsets, mask=inside, other=0).to(tl.float32)
    tl.store(out + offsets, narrow(code * scale, out.dtype.element_ty), mask=inside)


@triton.jit
def _convert_kernel(source, target, numel, target_numel, SIZE: tl.constexpr):
    # target[i] = source[i] in target's dtype; 0 in the padding numel <= i < target_numel
    offsets = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    values = widen(tl.load(source + offsets, mask=offsets < numel, other=0.0))
    tl.store(target + offsets, narrow(values, target.dtype.element_ty), mask=offsets < target_numel)


def _sections(numel: int, codec: str) -> tuple[int, int]:
    """(bytes of scales, bytes of payload), both padded."""
    if codec not in PAYLOAD_DTYPES:
        raise ValueError(f"unknown codec {codec!r}: use one of {', '.join(PAYLOAD_DTYPES)}")
    scales = 4 * triton.cdiv(numel, BLOCK.value) if codec == "int8" else 0
    payload = PAYLOAD_DTYPES[codec].itemsize * numel
    return triton.cdiv(scales, ALIGN_BYTES) * ALIGN_BYTES, triton.cdiv(payload, ALIGN_BYTES) * ALIGN_BYTES


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in SOURCE_DTYPES:
        raise TypeError(f"a wire holds float16, bfloat16 or float32, not {dtype}: convert with .to() first")


def pack(x: Tensor, codec: str, header: bytes) -> Tensor:
    """Encodes a tensor of any shape and strides.

    Args:
        x: fp16, bf16 or fp32.
        codec: fp16, bf16 or int8.
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
    scales_bytes, payload_bytes = _sections(numel, codec)
    wire = torch.empty(HEADER_BYTES + scales_bytes + payload_bytes, dtype=torch.uint8, device=x.device)
    wire[:HEADER_BYTES].copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))
    if numel == 0:
        return wire
    flat = x.contiguous().view(-1)
    payload = wire[HEADER_BYTES + scales_bytes :].view(PAYLOAD_DTYPES[codec])
    if codec == "int8":
        scales = wire[HEADER_BYTES : HEADER_BYTES + scales_bytes].view(torch.float32)
        grid = (scales.numel() // BLOCKS_PER_PROGRAM,)
        blocks = triton.cdiv(numel, BLOCK.value)
        _quantize_int8_kernel[grid](flat, scales, payload, numel, blocks, BLOCKS_PER_PROGRAM, **LAUNCH)
    else:
        grid = (triton.cdiv(payload.numel(), CONVERT_SIZE),)
        _convert_kernel[grid](flat, payload, numel, payload.numel(), CONVERT_SIZE, **LAUNCH)
    return wire


def unpack(wire: Tensor, shape: Sequence[int], dtype: torch.dtype, codec: str) -> Tensor:
    """Decodes what ``pack`` made; looks at no value of the header.

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
    scales_bytes, payload_bytes = _sections(numel, codec)
    if wire.dtype != torch.uint8 or wire.shape != (HEADER_BYTES + scales_bytes + payload_bytes,):
        raise ValueError(
            f"a {codec} wire of shape {tuple(shape)} is uint8 [{HEADER_BYTES + scales_bytes + payload_bytes}], "
            f"this is {wire.dtype} {list(wire.shape)}"
        )
    out = torch.empty(tuple(shape), dtype=dtype, device=wire.device)
    if numel == 0:
        return out
    if wire.storage_offset() % 4 or not wire.is_contiguous():
        wire = wire.clone(memory_format=torch.contiguous_format)  # views of wider types need aligned bytes
    payload = wire[HEADER_BYTES + scales_bytes :].view(PAYLOAD_DTYPES[codec])
    grid = (triton.cdiv(numel, CONVERT_SIZE),)
    if codec == "int8":
        scales = wire[HEADER_BYTES : HEADER_BYTES + scales_bytes].view(torch.float32)
        _dequantize_int8_kernel[grid](scales, payload, out, numel, CONVERT_SIZE, **LAUNCH)
    else:
        _convert_kernel[grid](payload, out, numel, numel, CONVERT_SIZE, **LAUNCH)
    return out
