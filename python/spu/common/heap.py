"""The C library's heap: large tensors with mappings of their own, so that what is freed is given back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["LARGE_BYTES", "large_tensors_unmapped", "unmap_large_tensors"]

LARGE_BYTES = 1 << 20
_MOST_BYTES = 32 << 20  # to which glibc raises its threshold by itself
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's mallopt


def unmap_large_tensors() -> None:
    """Let glibc give large tensors mappings of their own, which leave nothing behind when they are freed.

    By default it raises the size from which it does so to that of whatever has been freed, up to 32 MB. Inputs of
    layers, which stay, then lie between temporary tensors, and the heap grows by several times what is alive: in a
    decoder of width 1,024 by 20 MB a layer instead of 4.
    """
    _set(_MMAP_THRESHOLD, LARGE_BYTES)


@contextmanager
def large_tensors_unmapped() -> Iterator[None]:
    """Do so in this block; afterwards glibc's limits are those that it comes to by itself when tensors are freed."""
    unmap_large_tensors()
    try:
        yield
    finally:
        _set(_MMAP_THRESHOLD, _MOST_BYTES)
        _set(_TRIM_THRESHOLD, 2 * _MOST_BYTES)


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(parameter, value)
