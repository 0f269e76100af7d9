"""Checksums of pieces of a region: what was written is what must be read."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable
from types import ModuleType

compiled: ModuleType | None
try:
    from spu import _host as compiled
except ImportError:  # installed without a compiler
    compiled = None

__all__ = ["Checksums", "checksum", "checksum_name", "compiled"]

checksum: Callable[..., int] = getattr(compiled, "crc32c", zlib.crc32)
"""Return the checksum of contiguous memory, without the interpreter's lock: CRC-32C, or zlib's CRC-32."""

checksum_name = "crc32" if checksum is zlib.crc32 else "crc32c"

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

    def set(self, piece: int, value: int) -> None:
        """Remember the checksum of what was written."""
        self._values[piece] = value

    def agrees(self, piece: int, value: int) -> bool:
        """Tell whether this is the checksum of what was written last."""
        return self._values[piece] == value
