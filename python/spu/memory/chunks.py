"""Copies between a device and memory of the host that could not be page-locked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from spu.memory.streams import Event, Streams

__all__ = ["CHUNK_BYTES", "Chunks"]

CHUNK_BYTES = 4 << 20
"""Bytes of a buffer through which memory is copied that is not page-locked: large enough for the link's full rate."""


class Chunks:
    """Copies between a device and memory that is not page-locked, through two small buffers that are.

    Args:
        streams: do the copies.
        buffers: two, of one size, page-locked.
    """

    def __init__(self, streams: Streams, buffers: Sequence[Tensor]) -> None:
        self._streams, self._buffers = streams, list(buffers)
        self._size = self._buffers[0].numel()
        self._used: list[Event | None] = [None] * len(self._buffers)

    @property
    def bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.numel() for buffer in self._buffers)

    def _cut(self, size: int) -> Iterable[tuple[int, slice, Tensor]]:
        for k, at in enumerate(range(0, size, self._size)):
            turn, end = k % len(self._buffers), min(size, at + self._size)
            yield turn, slice(at, end), self._buffers[turn][: end - at]

    def inward(self, into: Tensor, source: Tensor, after: Sequence[Event]) -> Event:
        """Copy ``source`` to the device; the thread waits until it has been read."""
        event = None
        for turn, part, buffer in self._cut(source.numel()):
            used = self._used[turn]
            if used is not None:
                used.synchronize()
            buffer.copy_(source[part])
            event = self._used[turn] = self._streams.copy(into[part], buffer, after)
        return self._streams.mark() if event is None else event

    def outward(self, into: Tensor, source: Tensor, after: Sequence[Event]) -> Event:
        """Copy ``source`` from the device; the thread waits until ``into`` has all of it."""
        event, waiting = None, None
        for _, part, buffer in self._cut(source.numel()):
            event = self._streams.copy(buffer, source[part], after)
            if waiting is not None:
                self._put(into, *waiting)
            waiting = part, buffer, event
        if waiting is not None:
            self._put(into, *waiting)
        return self._streams.mark() if event is None else event

    @staticmethod
    def _put(into: Tensor, part: slice, buffer: Tensor, event: Event) -> None:
        event.synchronize()
        into[part].copy_(buffer)
