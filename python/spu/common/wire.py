"""Layout of a packed tensor ("wire"), version 1: its header, and which tensors it can hold. Sizes: ``codecs.py``.

One uint8 buffer, little endian: a 64-byte header, then the scales (fp32, one per block, padded to 64 bytes), then the
payload (padded to 64 bytes). int4 holds two values a byte, the first of each pair in the low four bits, in two's
complement; after an odd last value the high bits are zero. Header: magic ``SPUW``, u8 version, u8 codec, u8 source
dtype, u8 ndim, u32 block, 4 zero bytes, i64 numel, i64 dims[5].
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spu.common.codecs import CODECS, HEADER_BYTES, codec_of, numel_of, packed_bytes

__all__ = [
    "DTYPE_CODES",
    "MAGIC",
    "MAX_NDIM",
    "VERSION",
    "Header",
    "check_source",
    "header",
    "parse_header",
    "wire_bytes",
]

MAGIC = b"SPUW"
VERSION = 1
MAX_NDIM = 5
_HEADER = struct.Struct("<4sBBBBI4xq5q")
assert _HEADER.size == HEADER_BYTES


DTYPE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_CODEC_NAMES = {codec.code: codec.name for codec in CODECS.values()}
_DTYPE_OF_CODE = {code: dtype for dtype, code in DTYPE_CODES.items()}


def check_source(shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise unless a tensor of this shape and dtype can be packed."""
    if dtype not in DTYPE_CODES:
        raise TypeError(f"cannot pack {dtype}: a wire holds float16, bfloat16 or float32; convert with .to() first")
    if len(shape) > MAX_NDIM:
        raise ValueError(
            f"cannot pack a tensor of {len(shape)} dimensions {tuple(shape)}: a wire header has room for {MAX_NDIM}; "
            "flatten some of them first"
        )


def wire_bytes(shape: Sequence[int], dtype: torch.dtype, codec: str) -> int:
    """Return the size of the wire in bytes, from shape, source dtype and codec alone.

    Raises:
        ValueError: for an unknown codec or more than five dimensions.
        TypeError: for a dtype that no wire can hold.
    """
    check_source(shape, dtype)
    return packed_bytes(numel_of(shape), codec)


def header(shape: Sequence[int], dtype: torch.dtype, codec: str) -> bytes:
    """Return the 64 header bytes."""
    found, dims = codec_of(codec), [*shape, *([0] * (MAX_NDIM - len(shape)))]
    return _HEADER.pack(
        MAGIC, VERSION, found.code, DTYPE_CODES[dtype], len(shape), found.block, numel_of(shape), *map(int, dims)
    )


@dataclass(frozen=True)
class Header:
    """The fields of a header."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    codec: str


def parse_header(data: bytes) -> Header:
    """Read and validate a header.

    Raises:
        ValueError: if the bytes are not a header of this version; the message names the field and its value.
    """
    if len(data) < HEADER_BYTES:
        raise ValueError(f"not a wire: {len(data)} bytes, but a header alone has {HEADER_BYTES}")
    magic, version, code, dtype_code, ndim, block, numel, *dims = _HEADER.unpack(data[:HEADER_BYTES])
    if magic != MAGIC:
        raise ValueError(f"not a wire: it starts with {magic!r} instead of {MAGIC!r}; was it made by spu.ops.pack?")
    if version != VERSION:
        raise ValueError(f"wire version {version}: this spu reads version {VERSION}; use the spu that wrote it")
    if code not in _CODEC_NAMES or dtype_code not in _DTYPE_OF_CODE or ndim > MAX_NDIM:
        raise ValueError(f"corrupt wire header: codec {code}, dtype {dtype_code}, ndim {ndim}")
    codec, shape = CODECS[_CODEC_NAMES[code]], tuple(dims[:ndim])
    if block != codec.block or any(size < 0 for size in shape) or numel != numel_of(shape):
        raise ValueError(f"corrupt wire header: codec {codec.name}, block {block}, numel {numel}, shape {shape}")
    return Header(shape, _DTYPE_OF_CODE[dtype_code], codec.name)
