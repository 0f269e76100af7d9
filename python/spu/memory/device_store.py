"""Regions below a device: their bytes come to slots on the device, and the host updates them on their way.

The regions are in the host's memory, from which a GPU copies by itself, or on a disk, from which they come through
slots in the host's memory. For a stage whose update is deferred, one job does everything in order::

    disk (if it is there) -> the host's memory: update -> copy to the device's slot -> changes back to the disk

Jobs run in threads of their own, one for what comes and one for what leaves, in the order in which they were asked for,
beside the device's computations. Only a stage's first computation waits for its weights; and where a slot is filled
again, the copy waits for the computations that were enqueued before it was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from spu.memory.chunks import Chunks
from spu.memory.disk_store import DiskStore
from spu.memory.host_store import HostStore
from spu.memory.store import Region, Store, StoreError, Ticket
from spu.memory.streams import Event, Streams

__all__ = ["DeviceStore", "HostUpdate", "Part", "Staging"]


class Part(NamedTuple):
    """A region that is brought.

    Attributes:
        region: its number.
        bytes: of it that are wanted, from its start.
        into: uint8 [bytes] on the device; None: the host alone needs it.
    """

    region: Region
    bytes: int
    into: Tensor | None


@dataclass(frozen=True)
class HostUpdate:
    """What the host does with regions before they come.

    Attributes:
        further: regions that it needs beside those that are brought.
        run: takes all of them, by region, as uint8 memory of the host; tells whether it has changed any.
        written: those that it changes.
    """

    further: Sequence[Part]
    run: Callable[[Mapping[Region, Tensor]], bool]
    written: Sequence[Region]


@dataclass
class _Left:
    """What a job has started and not waited for."""

    event: Event
    tickets: Sequence[Ticket] = ()

    def settle(self) -> None:
        self.event.synchronize()
        for ticket in self.tickets:
            ticket.wait()


_Job = Future[_Left]


def _left(job: _Job) -> _Left | None:
    """Wait for a job, and return what it has started; None if it has failed, which its own ticket tells."""
    return None if job.exception() is not None else job.result()


@dataclass(eq=False)
class _Place:
    """Host memory that one job uses at a time, and the last one that did."""

    memory: Tensor
    job: _Job | None = None


class Staging:
    """Memory of the host between a disk and a device.

    Args:
        weights: uint8 slots for what is brought, as `DeviceStore.bring` numbers them.
        buffers: uint8 slots for what the host needs beside it and for what leaves the device, used in turns.
    """

    def __init__(self, weights: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        self._weights, self._buffers = [_Place(m) for m in weights], [_Place(m) for m in buffers]
        self._turn = 0

    @property
    def bytes(self) -> int:
        """Bytes of all of it."""
        return sum(place.memory.numel() for place in (*self._weights, *self._buffers))

    def weights(self, slot: int) -> _Place:
        """Return the place of a slot of the device, which may have more of them."""
        return self._weights[slot % len(self._weights)]

    def buffer(self) -> _Place:
        """Return the place whose turn it is."""
        self._turn = (self._turn + 1) % len(self._buffers)
        return self._buffers[self._turn]


@dataclass
class _Threads:
    """One for what comes, one for what leaves, one that reads ahead from a disk."""

    inward: ThreadPoolExecutor = field(default_factory=lambda: _thread("in"))
    outward: ThreadPoolExecutor = field(default_factory=lambda: _thread("out"))
    reader: ThreadPoolExecutor = field(default_factory=lambda: _thread("read"))


def _thread(name: str) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(1, thread_name_prefix=f"spu below {name}")
    pool.submit(lambda: None).result()  # it begins now: a thread has the thread count of the one that starts it
    return pool


class _Crossing:
    """A ticket of a job: computations wait for it, and the calling thread only until it has been enqueued."""

    def __init__(self, job: _Job, streams: Streams) -> None:
        self._job, self._streams = job, streams

    def wait(self) -> None:
        """Let the computations that this thread enqueues from now on begin after it; see `Ticket.wait`."""
        self._streams.hold(self._job.result().event)


class DeviceStore:
    """A store for slots on a device, over a store of its host, which may update what is on its way.

    All of it is called by one thread at a time. Jobs of one region run in the order in which they were asked for.

    Args:
        below: the host's store: a `HostStore`, or one on a disk.
        streams: of the device.
        staging: for what comes from a disk; None for a `HostStore`.
        chunks: for what comes and for what leaves, where the memory of ``below`` is not page-locked; None: such memory
            is copied as it is.

    Attributes:
        note: why not all of the host's memory on the way is page-locked; "" otherwise.
    """

    def __init__(
        self,
        below: Store,
        streams: Streams,
        *,
        staging: Staging | None = None,
        chunks: tuple[Chunks, Chunks] | None = None,
    ) -> None:
        if staging is None and not isinstance(below, HostStore):
            raise ValueError(f"what is in a {type(below).__name__} comes to a device through the host: give staging")
        self.below = below
        self.note = ""
        self._streams, self._staging, self._chunks = streams, staging, chunks
        self._last: dict[Region, _Job] = {}
        self._threads: _Threads | None = _Threads()
        self._pid = os.getpid()

    @property
    def own_bytes(self) -> int:
        """Bytes of the host's memory that lie between the store below and the device."""
        between = 0 if self._staging is None else self._staging.bytes
        own = self.below.own_bytes if isinstance(self.below, DiskStore) else 0
        return between + own + sum(chunks.bytes for chunks in self._chunks or ())

    def allocate(self, names: Sequence[str], sizes: Sequence[int]) -> list[Region]:
        """Reserve regions in the store below; see `Store.allocate`."""
        return self.below.allocate(names, sizes)

    def home(self, region: Region) -> Tensor:
        """Return the region itself, memory of the host; see `Store.home`."""
        return self.below.home(region)

    def read(self, region: Region, into: Tensor) -> Ticket:
        """Start to copy the first bytes of a region into ``into``, uint8 on the device; see `Store.read`."""
        return self.bring(0, [Part(region, into.numel(), into)])

    def bring(self, slot: int, parts: Sequence[Part], update: HostUpdate | None = None) -> Ticket:
        """Start to bring regions to the device, after an update of theirs by the host if there is one.

        The copies begin when the device has done what the calling thread has enqueued so far.

        Args:
            slot: of the device; of ``staging``, the place with its number is used.
            parts: what is brought.
            update: what the host does first, in a thread of its own.

        Returns:
            A ticket; to wait for it raises what the update raised, too.
        """
        mark = self._streams.mark()
        needed = [*parts, *(update.further if update is not None else ())]
        before = self._before(needed)
        if self._staging is None:
            here = {part.region: self.below.home(part.region)[: part.bytes] for part in needed}
            places, filled = list[_Place](), _ready(here)
        else:
            places = [self._staging.weights(slot), *([self._staging.buffer()] if update is not None else [])]
            laid = _laid(places[0], parts) | (_laid(places[1], update.further) if update is not None else {})
            users = [place.job for place in places if place.job is not None]
            filled = self._pool().reader.submit(self._fill, laid, [*before.values(), *users]).result

        def bring() -> _Left:
            memory = filled()
            changed = False
            if update is not None:
                _settle(before.values())
                changed = update.run(memory)
            event = mark
            for part in parts:
                if part.into is not None and part.bytes:
                    event = self._inward(part.into, memory[part.region], part.region, [mark, *_events(before, part)])
            written = update.written if update is not None and changed and self._staging is not None else ()
            return _Left(event, [self.below.write(region, memory[region]) for region in written])

        return self._submitted(self._pool().inward, bring, needed, places)

    def write(self, region: Region, data: Tensor) -> Ticket:
        """Start to copy ``data``, uint8 on the device, over the first bytes of a region; see `Store.write`.

        The copy begins when the device has done what the calling thread has enqueued so far.
        """
        mark, part = self._streams.mark(), Part(region, data.numel(), data)
        before = self._before([part])
        place = None if self._staging is None else self._staging.buffer()
        users = [place.job] if place is not None and place.job is not None else []
        home = self.below.home(region)[: part.bytes] if place is None else place.memory[: part.bytes]

        def take() -> _Left:
            if place is not None:
                _settle([*before.values(), *users])
            event = mark
            if part.bytes:
                event = self._outward(home, data, region, [mark, *_events(before, part)])
            if place is None:
                return _Left(event)
            event.synchronize()
            return _Left(event, [self.below.write(region, home)])

        return self._submitted(self._pool().outward, take, [part], [] if place is None else [place])

    def exposed(self, regions: Sequence[Region]) -> None:
        """Wait for all jobs, then see `Store.exposed`."""
        _settle(self._last.values())
        self._last.clear()
        self.below.exposed(regions)

    def hidden(self, regions: Sequence[Region]) -> None:
        """See `Store.hidden`."""
        self.below.hidden(regions)

    def close(self) -> None:
        """End what is queued and what is in progress, and close the store below; harmless when called twice."""
        threads, self._threads = self._threads, None
        if threads is not None and self._pid == os.getpid():
            for pool in (threads.reader, threads.inward, threads.outward):
                pool.shutdown(wait=True)
            for job in self._last.values():
                try:
                    _settle([job])
                except RuntimeError:  # who uses the store has been told
                    continue
        self._last.clear()
        self.below.close()

    # Inside

    def _pool(self) -> _Threads:
        if self._threads is None:
            raise StoreError("the store is closed")
        if self._pid != os.getpid():
            raise StoreError("this process was forked, and the threads that copy are in its parent only")
        return self._threads

    def _before(self, parts: Sequence[Part]) -> dict[Region, _Job]:
        return {part.region: self._last[part.region] for part in parts if part.region in self._last}

    def _submitted(
        self, pool: ThreadPoolExecutor, work: Callable[[], _Left], parts: Sequence[Part], places: Sequence[_Place]
    ) -> Ticket:
        job = pool.submit(work)
        self._last.update((part.region, job) for part in parts)
        for place in places:
            place.job = job
        return _Crossing(job, self._streams)

    def _fill(self, laid: Mapping[Region, Tensor], before: Sequence[_Job]) -> Mapping[Region, Tensor]:
        """Read regions from the disk into their places, when the jobs before are done with both."""
        _settle(before)
        for ticket in [self.below.read(region, memory) for region, memory in laid.items()]:
            ticket.wait()
        return laid

    def _inward(self, into: Tensor, source: Tensor, region: Region, after: Sequence[Event]) -> Event:
        chunks = self._chunks_for(region)
        return self._streams.copy(into, source, after) if chunks is None else chunks[0].inward(into, source, after)

    def _outward(self, into: Tensor, source: Tensor, region: Region, after: Sequence[Event]) -> Event:
        chunks = self._chunks_for(region)
        return self._streams.copy(into, source, after) if chunks is None else chunks[1].outward(into, source, after)

    def _chunks_for(self, region: Region) -> tuple[Chunks, Chunks] | None:
        locked = not isinstance(self.below, HostStore) or self.below.is_pinned(region)
        return None if locked else self._chunks


def _ready(value: Mapping[Region, Tensor]) -> Callable[[], Mapping[Region, Tensor]]:
    """Return a function that returns a value which is there already."""
    return lambda: value


def _laid(place: _Place, parts: Sequence[Part]) -> dict[Region, Tensor]:
    """Return the memory of regions that lie in a place one after the other."""
    found, at = {}, 0
    for part in parts:
        found[part.region] = place.memory[at : at + part.bytes]
        at += part.bytes
    return found


def _events(before: Mapping[Region, _Job], part: Part) -> list[Event]:
    """Return when the last job of a part's region is done on the device."""
    left = _left(before[part.region]) if part.region in before else None
    return [] if left is None else [left.event]


def _settle(jobs: Iterable[_Job]) -> None:
    """Wait for all that jobs have started; a job that has failed has told it to whom it was for."""
    for job in list(jobs):
        left = _left(job)
        if left is not None:
            left.settle()
