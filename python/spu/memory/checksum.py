"""Checksums of pieces of a region: what was written is what must be read."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable

_crc32c: Callable[..., int] | None
try:
    from spu import _host
except ImportError:  # installed without a compiler
    _crc32c = None
else:
    _crc32c = getattr(_host, "crc32c", None)

__all__ = ["Checksums", "checksum", "checksum_name"]

checksum: Callable[..., int] = zlib.crc32 if _crc32c is None else _crc32c
"""Return the checksum of contiguous memory, without the interpreter's lock: CRC-32C, or zlib's CRC-32."""

checksum_name = "crc32" if _crc32c is None else "crc32c"

_NEVER = -1


class Checksums:
    """One number for each piece of a file, all of them allocated at the start.

    Args:
        pieces: how many.
    """

    def __init__(self, pieces: int) -> None:
        self._values = array("q", [_NEVER]) * pieces

    def written(self, piece: int) -> bool:
        """Tell whether a piece has been written; one that has not is zeros."""
        return self._values[piece] != _NEVER

    def take(self, piece: int, data: object) -> None:
        """Remember the checksum of a piece's bytes."""
        self._values[piece] = checksum(data)

    def agrees(self, piece: int, data: object) -> bool:
        """Tell whether these are the bytes of which `take` was told last."""
        return self._values[piece] == checksum(data)
