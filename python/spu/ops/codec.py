"""``pack`` and ``unpack``: tensors as one uint8 buffer for links, saved activations and files. Layout: ``wire.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spu.common import wire
from spu.common.codecs import HEADER_BYTES, block_count, codec_of, numel_of
from spu.common.wire import wire_bytes
from spu.ops import schema
from spu.ops.dispatch import choose_backend

__all__ = ["is_finite_wire", "pack", "unpack", "wire_bytes"]


def pack(x: Tensor, codec: str) -> Tensor:
    """Encode a tensor.

    "fp16" and "bf16" convert the values. The others store blocks of values (in contiguous order) with one fp32 scale
    each, absmax / largest code, and round half to even:

    ========  ======  ============  ===========================================
    codec     block   largest code  error of a value, at most
    ========  ======  ============  ===========================================
    int8      64      127           half the block's scale
    int4      32      7             half the block's scale
    fp8_e4m3  64      448           2^-4 of it, or 2^-10 scales if that is more
    fp8_e5m2  64      57344         2^-3 of it, or 2^-17 scales if that is more
    ========  ======  ============  ===========================================

    A block with a non-finite value decodes to NaN as a whole: an overflow is still seen on the other side.

    Args:
        x: fp16, bf16 or fp32 of any strides and at most 5 dimensions; no gradient flows through.
        codec: "fp16", "bf16", "int8", "int4", "fp8_e4m3" or "fp8_e5m2".

    Returns:
        uint8 [wire_bytes(x.shape, x.dtype, codec)], on the same device.

    Raises:
        ValueError: unknown codec, or too many dimensions.
        TypeError: another dtype.
    """
    codec_of(codec)
    wire.check_source(x.shape, x.dtype)
    return schema.overload("pack", choose_backend(x, op="pack"))(x.detach(), codec)


def _check_header(buffer: Tensor, shape: Sequence[int], dtype: torch.dtype) -> str:
    if buffer.device.type != "cpu":
        raise ValueError(
            f"unpack: reading the header of a wire on {buffer.device} would wait for the device: pass codec=, or move "
            "the wire to the CPU"
        )
    found = wire.parse_header(bytes(buffer[:HEADER_BYTES].tolist()))
    if found.shape != tuple(shape):
        raise ValueError(f"unpack: the wire holds a tensor of shape {found.shape}, not {tuple(shape)}")
    if found.dtype != dtype:
        raise ValueError(f"unpack: the wire was packed from {found.dtype}, not {dtype}: pass dtype={found.dtype}")
    return found.codec


def unpack(buffer: Tensor, shape: Sequence[int], dtype: torch.dtype, codec: str | None = None) -> Tensor:
    """Decode the result of ``pack``.

    Args:
        buffer: uint8 [wire_bytes(shape, dtype, codec)].
        shape: of the packed tensor.
        dtype: of the result: fp16, bf16 or fp32. With codec=None it must be the packed tensor's own.
        codec: what it was packed with: then no value of the header is read or checked. None: the header is read and
            must agree with ``shape`` and ``dtype``; for buffers on the CPU only.

    Raises:
        ValueError: wrong size, unknown codec, or (codec=None) a header that is corrupt or disagrees.
        TypeError: a buffer that is not uint8, or another dtype.
    """
    if buffer.dtype != torch.uint8 or buffer.dim() != 1:
        raise TypeError(f"unpack: a wire is a flat uint8 tensor, got {buffer.dtype} of shape {tuple(buffer.shape)}")
    wire.check_source(shape, dtype)
    if codec is None:
        codec = _check_header(buffer, shape, dtype)
    expected = wire_bytes(shape, dtype, codec)
    if buffer.shape[0] != expected:
        raise ValueError(
            f"unpack: the wire has {buffer.shape[0]} bytes, but {tuple(shape)} {dtype} in codec {codec!r} takes "
            f"{expected}"
        )
    backend = choose_backend(buffer, dtype, op="unpack")
    return schema.overload("unpack", backend)(buffer, tuple(shape), dtype, codec)


def is_finite_wire(buffer: Tensor, shape: Sequence[int], dtype: torch.dtype, codec: str) -> bool:
    """Tell whether ``unpack`` would return finite values only. This reads the wire's scales, or its values where it has
    no scales, and waits for the device.
    """
    found, numel = codec_of(codec), numel_of(shape)
    body = buffer[HEADER_BYTES:]
    if codec in ("fp16", "bf16"):
        plain = torch.float16 if codec == "fp16" else torch.bfloat16
        return bool(body[: 2 * numel].view(plain).to(dtype).isfinite().all())
    scales = body[: 4 * block_count(numel, found)].view(torch.float32)
    return bool((scales * found.largest).isfinite().all())
