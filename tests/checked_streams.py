"""Streams of a device that exists on the CPU alone: copies run as late as they may, and a missing wait shows.

What nothing has waited for has not been copied: who reads too early sees old bytes. And every use of memory carries a
vector clock of the three queues (computations, copies in, copies out): a copy into memory, or out of it, that no event
orders with the last use of this memory is an error, though here it would have gone well.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from spu.memory.residency import Visit
from spu.memory.streamed import Streamed

Clock = dict[str, int]
_NOTHING = torch.empty(0, dtype=torch.uint8)


def joined(clocks: Iterable[Clock]) -> Clock:
    found: Clock = {}
    for clock in clocks:
        for queue, time in clock.items():
            found[queue] = max(found.get(queue, 0), time)
    return found


class Moment:
    """An event: a moment of one queue, and what is known to have happened before it."""

    def __init__(self, streams: CheckedStreams, clock: Clock, copy: _Copy | None = None) -> None:
        self.streams, self.clock, self.copy = streams, clock, copy

    def synchronize(self) -> None:
        self.streams.reach(self)
        host = self.streams.host
        host.clock = joined([getattr(host, "clock", {}), self.clock])


class _Copy:
    def __init__(self, queue: str, into: Tensor, source: Tensor, after: Sequence[Moment]) -> None:
        self.queue, self.into, self.source, self.after, self.done = queue, into, source, after, False


class CheckedStreams:
    """See above.

    Args:
        device: memory that counts as the device's.

    Attributes:
        copies: how many were started.
        checked: pairs of uses that an event orders.
    """

    def __init__(self) -> None:
        self.device: list[Tensor] = []
        self.copies = self.checked = 0
        self.host = threading.local()
        self.errors: list[str] = []
        self._lock = threading.RLock()
        self._queued: dict[str, list[_Copy]] = {"in": [], "out": []}
        self._clocks: dict[str, Clock] = {"compute": {}, "in": {}, "out": {}}
        self._uses: list[tuple[int, int, bool, str, int]] = []

    def mark(self) -> Moment:
        with self._lock:
            return Moment(self, self._tick("compute", []))

    def hold(self, event: Any) -> None:
        with self._lock:
            self.reach(event)
            self._clocks["compute"] = joined([self._clocks["compute"], event.clock])

    def copy(self, into: Tensor, source: Tensor, after: Iterable[Any] = ()) -> Moment:
        with self._lock:
            queue = "in" if self._is_device(into) else "out"
            after = list(after)
            clock = self._tick(queue, [event.clock for event in after])
            self._use(queue, clock, source, writes=False)
            self._use(queue, clock, into, writes=True)
            self.copies += 1
            copy = _Copy(queue, into, source, after)
            self._queued[queue].append(copy)
            return Moment(self, clock, copy)

    def reach(self, event: Any) -> None:
        """Do what has to be done before a moment."""
        with self._lock:
            copy = event.copy
            while copy is not None and not copy.done:
                first = self._queued[copy.queue][0]
                for before in first.after:
                    self.reach(before)
                self._queued[copy.queue].pop(0)
                first.into.copy_(first.source)
                first.done, first.after = True, []
                first.into = first.source = _NOTHING

    def computes(self, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        """Note that computations that are enqueued now use memory."""
        with self._lock:
            clock = self._tick("compute", [])
            for memory in reads:
                self._use("compute", clock, memory, writes=False)
            for memory in writes:
                self._use("compute", clock, memory, writes=True)

    def _tick(self, queue: str, after: Sequence[Clock]) -> Clock:
        clock = joined([self._clocks[queue], getattr(self.host, "clock", {}), *after])
        clock[queue] = clock.get(queue, 0) + 1
        self._clocks[queue] = clock
        return dict(clock)

    def _is_device(self, tensor: Tensor) -> bool:
        at = tensor.data_ptr()
        return any(own.data_ptr() <= at < own.data_ptr() + own.numel() for own in self.device)

    def _use(self, queue: str, clock: Clock, memory: Tensor, *, writes: bool) -> None:
        if not memory.numel():
            return
        start, end = memory.data_ptr(), memory.data_ptr() + memory.numel() * memory.element_size()
        kept = []
        for use in self._uses:
            other_start, other_end, other_writes, other, time = use
            overlaps = start < other_end and other_start < end
            if overlaps and (writes or other_writes):
                if clock.get(other, 0) < time:
                    does, did = ("writes" if w else "reads" for w in (writes, other_writes))
                    self.errors.append(f"{queue} {does} what {other} {did} at its {time}, and knows only {clock}")
                self.checked += 1
                if writes and start <= other_start and other_end <= end:
                    continue  # who comes after this one comes after that one
            kept.append(use)
        self._uses = [*kept, (start, end, writes, queue, clock[queue])]


def watched(residency: Streamed, streams: CheckedStreams) -> None:
    """Tell the streams what the stages use, between ``fetch`` and ``release`` of a residency."""
    streams.device = [*residency._slots, *residency._buffers]
    fetch, release = residency.fetch, residency.release

    def used(visit: Visit) -> None:
        unit = residency.units.get(visit.stage)
        if unit is not None:
            reads = [memory for _, memory in residency._weights(unit)]
            index = residency._buffer_of.get(unit.index) if visit.backward else None
            streams.computes(reads, [] if index is None else [residency._buffers[index][: unit.grad_bytes]])

    def watched_fetch(visit: Visit) -> None:
        fetch(visit)
        used(visit)

    def watched_release(visit: Visit) -> None:
        used(visit)
        release(visit)

    residency.fetch, residency.release = watched_fetch, watched_release  # type: ignore[method-assign]
