"""The codecs of packed tensors, and the sizes of a wire. Imports no torch, for command lines and plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "ALIGN_BYTES",
    "CODECS",
    "HEADER_BYTES",
    "Codec",
    "block_count",
    "codec_of",
    "numel_of",
    "packed_bytes",
    "parked_bytes",
    "payload_bytes",
    "scales_bytes",
]

HEADER_BYTES = 64
ALIGN_BYTES = 64  # of the sections after the header
_FEW = 8


@dataclass(frozen=True)
class Codec:
    """One way to store values.

    Attributes:
        name: as users write it.
        code: as the header holds it.
        item_bits: payload bits of one value.
        block: number of values (in contiguous order) that share a scale, 0 where there are none.
        largest: magnitude of the largest code; a block's scale is its absmax / largest. 0 without scales.
    """

    name: str
    code: int
    item_bits: int
    block: int
    largest: float


CODECS = {
    codec.name: codec
    for codec in (
        Codec("fp16", 0, 16, 0, 0),
        Codec("bf16", 1, 16, 0, 0),
        Codec("int8", 2, 8, 64, 127),
        Codec("int4", 3, 4, 32, 7),
        Codec("fp8_e4m3", 4, 8, 64, 448),
        Codec("fp8_e5m2", 5, 8, 64, 57344),
    )
}


def codec_of(name: str) -> Codec:
    """Return the codec of a name.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}: use one of {', '.join(map(repr, CODECS))}")
    return CODECS[name]


def _padded(size_bytes: int) -> int:
    return (size_bytes + ALIGN_BYTES - 1) // ALIGN_BYTES * ALIGN_BYTES


def numel_of(shape: Sequence[int]) -> int:
    """Return the product of the dimensions; also right for symbolic ones."""
    numel = 1
    for size in shape:
        numel = numel * size
    return numel


def block_count(numel: int, codec: Codec) -> int:
    """Return the number of scales on the wire."""
    return (numel + codec.block - 1) // codec.block if codec.block else 0


def scales_bytes(numel: int, codec: Codec) -> int:
    """Return the size of the scales section, padded."""
    return _padded(4 * block_count(numel, codec))


def payload_bytes(numel: int, codec: Codec) -> int:
    """Return the size of the payload, before padding."""
    return (numel * codec.item_bits + 7) // 8


def packed_bytes(numel: int, codec: str) -> int:
    """Return the size in bytes of a wire of ``numel`` values; the shape does not matter. Raise ValueError like
    ``codec_of``.
    """
    found = codec_of(codec)
    return HEADER_BYTES + scales_bytes(numel, found) + _padded(payload_bytes(numel, found))


def parked_bytes(numel: int, item_bytes: int, codec: str | None) -> int:
    """Return the bytes that a layer's input takes where it waits for the backward: packed, or as it is where a codec is
    None or would not make it smaller. There is room for the headers and the padding of a few tensors.

    Args:
        numel: values of all of its tensors.
        item_bytes: bytes of one of them.
        codec: a name in ``CODECS``, or None for exact.
    """
    plain = numel * item_bytes
    return _padded(plain if codec is None else min(plain, packed_bytes(numel, codec))) + _FEW * 2 * ALIGN_BYTES
