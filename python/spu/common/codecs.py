"""The codecs of packed tensors: how values are stored on a wire. Imports no torch, for command lines and plans."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CODECS", "Codec"]


@dataclass(frozen=True)
class Codec:
    """How values are stored.

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
