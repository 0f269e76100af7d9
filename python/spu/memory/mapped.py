"""Parts of a mapping as tensors, and which of them are still in use."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["Mapped"]


class Mapped:
    """An mmap of which parts are given out as tensors.

    ``torch.frombuffer`` keeps the object that it reads alive, but it does not keep its buffer exported: an mmap can be
    closed under a tensor, which then reads unmapped memory. A memoryview in between keeps the mmap open, and a weak
    reference to it tells whether any tensor still uses its part.

    Args:
        memory: the mapping; this object owns it.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory: mmap.mmap | None = memory
        self._size = len(memory)
        self._lock = threading.Lock()
        self._parts: dict[tuple[int, int], weakref.ref[memoryview]] = {}

    def view(self, start: int, size: int) -> Tensor:
        """Return bytes ``start`` to ``start + size`` as a uint8 tensor whose storage is these bytes and no more."""
        if self._memory is None:
            raise ValueError("the memory has been given back")
        if not 0 <= start <= start + size <= self._size:
            raise ValueError(f"bytes {start} to {start + size} do not lie in {self._size}")
        if size == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        with self._lock:  # two views of one part share its memoryview: there is one reference to tell by
            found = self._parts.get((start, size))
            part = None if found is None else found()
            if part is None:
                part = memoryview(self._memory)[start : start + size]
                self._parts[start, size] = weakref.ref(part)
        return torch.frombuffer(part, dtype=torch.uint8)

    def is_viewed(self, start: int, size: int) -> bool:
        """Tell whether a tensor still uses the part that `view` gave out for these arguments."""
        part = self._parts.get((start, size))
        return part is not None and part() is not None

    def flush(self, start: int, size: int) -> None:
        """Write what was changed in these bytes to the file below.

        Raises:
            OSError: the disk refused.
        """
        if self._memory is not None and size:
            self._memory.flush(start, size)

    def advise(self, advice: int, start: int, size: int) -> None:
        """Give the system advice about these bytes, `mmap.MADV_DONTNEED` for example."""
        if self._memory is not None and size:
            self._memory.madvise(advice, start, size)

    def unused(self) -> Iterator[tuple[int, int]]:
        """Yield (start, size) of the whole pages between the parts that tensors still use."""
        at = 0
        used = sorted(key for key, part in self._parts.items() if part() is not None)
        for start, size in [*used, (self._size, 0)]:
            first, end = -(-at // mmap.PAGESIZE) * mmap.PAGESIZE, start // mmap.PAGESIZE * mmap.PAGESIZE
            if end > first:
                yield first, end - first
            at = max(at, start + size)

    def close(self, advice: int, *, keep: bool) -> None:
        """Unmap, at once or when the last tensor that views a part is gone; harmless when called twice.

        Args:
            advice: for the bytes to give back before that: `mmap.MADV_DONTNEED` or `mmap.MADV_REMOVE`. Both free what
                lies below; a tensor that still views such bytes sees zeros.
            keep: whether the parts that are viewed keep their bytes until then.
        """
        memory, self._memory = self._memory, None
        if memory is None:
            return
        try:
            memory.close()
        except BufferError:
            for start, size in list(self.unused()) if keep else [(0, self._size)]:
                memory.madvise(advice, start, size)
