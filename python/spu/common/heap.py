"""The C library's heap: what is freed is given back, by mappings of large tensors' own or on request."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["LARGE_BYTES", "MIDDLE_BYTES", "give_back", "large_tensors_unmapped", "share_heaps", "unmap_large_tensors"]

LARGE_BYTES = 1 << 20
MIDDLE_BYTES = 128 << 10  # where glibc begins
_MOST_BYTES = 32 << 20  # to which glibc raises its threshold by itself
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8  # of glibc's mallopt


def unmap_large_tensors(least_bytes: int = LARGE_BYTES) -> None:
    """Let glibc give tensors from ``least_bytes`` on mappings of their own, which leave nothing behind when freed.

    By default it raises the size from which it does so to that of whatever has been freed, up to 32 MB. Inputs of
    layers, which stay, then lie between temporary tensors, and the heap grows by several times what is alive: in a
    decoder of width 1,024 by 20 MB a layer instead of 4.
    """
    _set(_MMAP_THRESHOLD, least_bytes)


@contextmanager
def large_tensors_unmapped() -> Iterator[None]:
    """Do so in this block; afterwards glibc's limits are those that it comes to by itself when tensors are freed."""
    unmap_large_tensors()
    try:
        yield
    finally:
        _set(_MMAP_THRESHOLD, _MOST_BYTES)
        _set(_TRIM_THRESHOLD, 2 * _MOST_BYTES)


def share_heaps() -> None:
    """Let threads that begin later use the heaps there are, instead of one each.

    A thread's heap keeps what was freed in it, and no other thread gets that memory.
    """
    _set(_ARENA_MAX, 1)


def give_back() -> None:
    """Return the free pages of all heaps to the system, also those between tensors that are alive."""
    _call("malloc_trim", 0)


def _set(parameter: int, value: int) -> None:
    _call("mallopt", parameter, value)


def _call(name: str, *arguments: int) -> None:
    """Call a function of glibc; nothing where the C library is another one."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
