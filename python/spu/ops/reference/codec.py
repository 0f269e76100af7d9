"""The definition of ``pack`` and ``unpack``, in plain torch, on any device. Layout and codecs: ``wire.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spu.common import wire
from spu.common.codecs import HEADER_BYTES, Codec, block_count, codec_of, numel_of, payload_bytes, scales_bytes

__all__ = ["IMPLEMENTATIONS", "pack", "unpack"]

_PLAIN = {"fp16": torch.float16, "bf16": torch.bfloat16}
_FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def _scales_of(blocks: Tensor, codec: Codec) -> Tensor:
    """Return the scales [B] of blocks [B, block] fp32: absmax / largest code; NaN for a non-finite block; 0 where that
    is subnormal.
    """
    if blocks.numel() == 0:
        return blocks.new_empty(blocks.shape[0])
    absmax = blocks.abs().amax(1)
    scales = absmax / codec.largest
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, torch.zeros_like(scales), scales)
    return torch.where(torch.isfinite(absmax), scales, torch.full_like(scales, float("nan")))


def _codes_of(quotient: Tensor, codec: Codec) -> Tensor:
    """Round fp32 values in units of their scale [B, block] to one code a value, uint8 [B * block]; ties go to even."""
    bounded = quotient.clamp(-codec.largest, codec.largest).reshape(-1)
    if codec.name in _FP8:
        return bounded.to(_FP8[codec.name]).view(torch.uint8)
    return bounded.round().to(torch.int8).view(torch.uint8)


def _values_of(codes: Tensor, codec: Codec) -> Tensor:
    """Return fp32 values, in units of their scale, of uint8 codes."""
    if codec.name in _FP8:
        return codes.view(_FP8[codec.name]).float()
    return codes.view(torch.int8).float()


def _pairs(codes: Tensor) -> Tensor:
    """Put int4 codes, one a byte [n], two into a byte [(n + 1) // 2], the first in the low four bits."""
    nibbles = F.pad(codes & 15, (0, codes.shape[0] % 2)).view(-1, 2)
    return nibbles[:, 0] | nibbles[:, 1] << 4


def _singles(packed: Tensor, numel: int) -> Tensor:
    """Invert ``_pairs``, sign-extended to int8 patterns."""
    nibbles = torch.stack([packed & 15, packed >> 4], dim=1).view(-1)[:numel]
    return (nibbles ^ 8) - 8  # in uint8 arithmetic this wraps to the two's complement


def pack(x: Tensor, codec: str) -> Tensor:
    """Encode x of any shape and strides into a wire, uint8 [wire_bytes]. The padding is zero."""
    found, numel = codec_of(codec), x.numel()
    out = torch.zeros(wire.wire_bytes(x.shape, x.dtype, codec), dtype=torch.uint8, device=x.device)
    head = bytearray(wire.header(x.shape, x.dtype, codec))
    # From pageable memory the driver takes it at once, and the host need not wait for what the card has queued.
    out[:HEADER_BYTES].copy_(torch.frombuffer(head, dtype=torch.uint8), non_blocking=True)
    flat = x.reshape(-1)
    start = HEADER_BYTES + scales_bytes(numel, found)
    payload = out[start : start + payload_bytes(numel, found)]
    if codec in _PLAIN:
        payload.view(_PLAIN[codec]).copy_(flat)
        return out
    count = block_count(numel, found)
    blocks = F.pad(flat.float(), (0, count * found.block - numel)).view(count, found.block)
    scales = _scales_of(blocks, found)
    usable = torch.isfinite(scales) & (scales > 0)
    quotient = blocks / torch.where(usable, scales, torch.ones_like(scales))[:, None]
    codes = _codes_of(torch.where(usable[:, None], quotient, torch.zeros_like(quotient)), found)[:numel]
    payload.copy_(_pairs(codes) if codec == "int4" else codes)
    out[HEADER_BYTES : HEADER_BYTES + 4 * count].view(torch.float32).copy_(scales)
    return out


def unpack(buffer: Tensor, shape: Sequence[int], dtype: torch.dtype, codec: str) -> Tensor:
    """Decode a wire into a tensor of ``shape`` and ``dtype``, without a look at any value of the header."""
    found, numel = codec_of(codec), numel_of(shape)
    if buffer.storage_offset() % 4 or not buffer.is_contiguous():
        buffer = buffer.clone(memory_format=torch.contiguous_format)  # views of wider types need aligned bytes
    start = HEADER_BYTES + scales_bytes(numel, found)
    payload = buffer[start : start + payload_bytes(numel, found)]
    if codec in _PLAIN:
        return payload.view(_PLAIN[codec]).to(dtype, copy=True).view(tuple(shape))
    count = block_count(numel, found)
    scales = buffer[HEADER_BYTES : HEADER_BYTES + 4 * count].view(torch.float32)
    values = _values_of(_singles(payload, numel) if codec == "int4" else payload, found)
    blocks = F.pad(values, (0, count * found.block - numel)).view(count, found.block) * scales[:, None]
    return blocks.reshape(-1)[:numel].to(dtype, copy=True).view(tuple(shape))


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"pack": pack, "unpack": unpack}
