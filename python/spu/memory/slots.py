"""How tensors get from a device to the regions of a store and back: by the regions' homes, or by a ring of slots."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spu import ops
from spu.common.codecs import numel_of
from spu.memory.host_store import HostStore
from spu.memory.slab import Slab, aligned
from spu.memory.store import Region, Store, StoreError, Ticket
from spu.transfer.side import Side
from spu.transfer.side import Ticket as Crossing

__all__ = ["Homes", "Piece", "Record", "Ring", "Way"]

_HOST = torch.device("cpu")
_LEAVING = 2  # inputs whose memory on the device is theirs yet while they are copied out: as planned


@dataclass(frozen=True)
class Piece:
    """A tensor's place in a region.

    Attributes:
        offset, nbytes: of its bytes there.
        shape, stride, dtype: of the tensor.
        codec: what it is packed with; None: it lies there in the order of its memory, or without gaps.
    """

    offset: int
    nbytes: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    codec: str | None

    def memory(self, buffer: Tensor) -> Tensor:
        """Return the piece of a slot: the wire, or memory in which the values lie as they lay in the tensor."""
        own = buffer[self.offset : self.offset + self.nbytes]
        if self.codec is not None:
            return own
        flat = own.view(self.dtype)
        return flat.as_strided(self.shape, self.stride) if self._is_dense() else flat.view(self.shape)

    def _is_dense(self) -> bool:
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride))
        return span == numel_of(self.shape)

    def made(self, device: torch.device) -> Tensor | None:
        """Return new memory of a device, for the wire or the tensor; None: a CPU unpacks from the slot itself."""
        if self.codec is None:
            return self._empty(device)
        return None if device.type == "cpu" else torch.empty(self.nbytes, dtype=torch.uint8, device=device)

    def copy_to(self, buffer: Tensor, into: Tensor | None) -> Tensor:
        """Copy the piece from a slot to what `made` has returned; return that."""
        memory = self.memory(buffer)
        return memory if into is None else into.copy_(memory, non_blocking=True)

    def unpacked(self, arrived: Tensor) -> Tensor:
        """Return the tensor, from what `copy_to` returned."""
        if self.codec is None:
            return arrived
        values = ops.unpack(arrived, self.shape, self.dtype, codec=self.codec)
        return values if values.stride() == self.stride else self._empty(values.device).copy_(values)

    def _empty(self, device: torch.device) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


@dataclass(eq=False)
class Record:
    """Tensors in a region.

    Attributes:
        region, region_bytes: the region and its size.
        stored_bytes: of it that are used, rounded up.
        pieces: the tensors.
        backend: what packs and unpacks; None: automatic.
    """

    region: Region
    region_bytes: int
    stored_bytes: int
    pieces: list[Piece]
    backend: str | None

    def copy_in(self, memory: Tensor, sources: Sequence[Tensor]) -> None:
        """Copy tensors or wires, one for each piece, to the record's bytes."""
        with torch.no_grad():
            for piece, source in zip(self.pieces, sources, strict=True):
                piece.memory(memory).copy_(source, non_blocking=True)

    def made(self, device: torch.device) -> list[Tensor | None]:
        """Return new memory of a device for the pieces."""
        return [piece.made(device) for piece in self.pieces]

    def copy_out(self, memory: Tensor, into: Sequence[Tensor | None]) -> list[Tensor]:
        """Copy the pieces from the record's bytes to what `made` has returned; for `unpacked`."""
        with torch.no_grad():
            return [piece.copy_to(memory, own) for piece, own in zip(self.pieces, into, strict=True)]

    def unpacked(self, arrived: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors, from what `copy_out` returned."""
        with torch.no_grad(), ops.use_backend(self.backend):
            return [piece.unpacked(tensor) for piece, tensor in zip(self.pieces, arrived, strict=True)]


class Way(Protocol):
    """How records get to their regions, and back to the device.

    Attributes:
        ahead: how many records `read` is given at most.
        size_bytes: memory that it has of its own.
    """

    ahead: int
    size_bytes: int

    def write(self, record: Record, sources: Sequence[Tensor]) -> None:
        """Copy tensors or wires, one for each piece, to the record's region; they may be freed at once.

        Raises:
            StoreError: an earlier write has failed.
        """

    def read(self, records: Sequence[Record]) -> None:
        """Start to bring records nearer, in the order in which they will be needed."""

    def begin(self, record: Record) -> None:
        """Start to copy to the device a record that `read` was called with, beside the device's work.

        Raises:
            StoreError: as for `tensors`.
        """

    def tensors(self, record: Record) -> list[Tensor]:
        """Return the tensors, in new memory of the device, of a record that `read` was called with.

        Raises:
            StoreError: it could not be read, or had not been written.
        """

    def drop(self, record: Record) -> None:
        """Forget a record: its region may be used again.

        Raises:
            StoreError: it could not be written.
        """

    def clear(self) -> None:
        """Forget all records; what is in progress ends first, well or not."""


class Homes:
    """The way to a store whose regions are host memory that the device reaches: nothing lies between.

    All memory of a card is of the stream that computes, and that stream waits for a copy before the memory may be used
    again. (`Tensor.record_stream` would keep it from use until the host has seen the copy's end. The host is far ahead
    of the card: nearly all inputs of a step would be in memory at one time, or each request end in one to the driver.)

    Args:
        store: the host's memory; page-locked beside a GPU.
        device: at the other end.
        side: where copies run beside the device's work, in the order in which they are begun; None: the calling thread
            copies.
    """

    ahead = 2
    size_bytes = 0

    def __init__(self, store: HostStore, device: torch.device, side: Side | None) -> None:
        self._store, self._device, self._side = store, device, side
        self._leaving: dict[int, Crossing] = {}  # by the record's identity
        self._arriving: dict[int, Crossing] = {}
        self._sources: deque[tuple[Crossing, list[Tensor]]] = deque()  # of copies that nothing has waited for

    def write(self, record: Record, sources: Sequence[Tensor]) -> None:
        """See `Way.write`."""
        home, own = self._store.home(record.region), list(sources)
        if self._side is None:
            record.copy_in(home, own)
            return
        left = self._leaving[id(record)] = self._side.start(lambda: record.copy_in(home, own), ())
        self._sources.append((left, own))
        self._let_go(_LEAVING)

    def _let_go(self, most: int) -> None:
        """Let the device's memory that is copied out be used again, all but that of so many copies."""
        while len(self._sources) > most:
            self._sources.popleft()[0].arrive(self._device)

    def read(self, records: Sequence[Record]) -> None:
        """Do nothing: the device copies from the homes."""

    def begin(self, record: Record) -> None:
        """See `Way.begin`. The side copies a record out after it has copied it in."""
        if self._side is not None and id(record) not in self._arriving:
            home, made = self._store.home(record.region), record.made(self._device)
            self._arriving[id(record)] = self._side.start(lambda: record.copy_out(home, made), ())

    def tensors(self, record: Record) -> list[Tensor]:
        """See `Way.tensors`."""
        self.begin(record)
        if self._side is None:
            return record.unpacked(record.copy_out(self._store.home(record.region), record.made(self._device)))
        left = self._leaving.get(id(record))
        if left is not None:
            left.arrive(self._device)
        arrived = self._arriving.pop(id(record)).arrive(self._device)
        self._let_go(0)  # with this one all that left before it has been copied
        return record.unpacked(arrived)

    def drop(self, record: Record) -> None:
        """See `Way.drop`. Whatever is copied to its region next is copied after what is on its way now."""
        self._leaving.pop(id(record), None)
        arriving = self._arriving.pop(id(record), None)
        if arriving is not None:  # its memory is used again after the copy
            arriving.arrive(self._device)

    def clear(self) -> None:
        """See `Way.clear`."""
        for crossing in (*self._leaving.values(), *self._arriving.values(), *(left for left, _ in self._sources)):
            with contextlib.suppress(Exception):  # the failure that is being cleared up is known
                crossing.arrive(_HOST)
        self._leaving.clear()
        self._arriving.clear()
        self._sources.clear()


@dataclass(eq=False)
class _Slot:
    """A slot, the record whose bytes are in it or will be, and its write or read in progress."""

    buffer: Tensor
    record: Record | None = None
    ticket: Ticket | None = None


class Ring:
    """The way from a CPU to any store: through slots of one size, which the store writes and reads in the background.

    Args:
        store: the tier.
        count: how many slots.
        size: bytes of a slot, at least those of any record.
    """

    def __init__(self, store: Store, count: int, size: int) -> None:
        self._store = store
        self.ahead = count
        self.size_bytes = count * aligned(size)
        self._slots = [_Slot(buffer) for buffer in Slab(self.size_bytes).slots([size] * count)]

    def write(self, record: Record, sources: Sequence[Tensor]) -> None:
        """See `Way.write`."""
        slot = self._take(())
        record.copy_in(slot.buffer, sources)
        slot.record = record
        slot.ticket = self._store.write(record.region, slot.buffer[: record.stored_bytes])

    def read(self, records: Sequence[Record]) -> None:
        """Start to read those of the records that are in no slot, into slots that hold none of them."""
        present = {id(slot.record) for slot in self._slots}
        for record in records:
            if id(record) not in present:
                slot = self._take(records)
                slot.record = record
                slot.ticket = self._store.read(record.region, slot.buffer[: record.stored_bytes])

    def begin(self, record: Record) -> None:
        """Do nothing: on a CPU, a copy beside the work only takes turns with it."""

    def tensors(self, record: Record) -> list[Tensor]:
        """See `Way.tensors`."""
        slot = next(slot for slot in self._slots if slot.record is record)
        self._settle(slot)
        return record.unpacked(record.copy_out(slot.buffer, record.made(_HOST)))

    def drop(self, record: Record) -> None:
        """See `Way.drop`."""
        for slot in self._slots:
            if slot.record is record:
                self._settle(slot)
                slot.record = None

    def clear(self) -> None:
        """See `Way.clear`."""
        for slot in self._slots:
            with contextlib.suppress(StoreError):
                self._settle(slot)
            slot.record = None

    def _take(self, needed: Sequence[Record]) -> _Slot:
        """Return a slot that holds none of the needed records: a free one, else the one that was used longest ago."""
        keep = {id(record) for record in needed}
        slot = min(
            (slot for slot in self._slots if slot.record is None or id(slot.record) not in keep),
            key=lambda slot: slot.record is not None,
        )
        self._settle(slot)
        self._slots.remove(slot)
        self._slots.append(slot)
        return slot

    @staticmethod
    def _settle(slot: _Slot) -> None:
        """Wait for what is in progress in a slot."""
        ticket, slot.ticket = slot.ticket, None
        if ticket is not None:
            ticket.wait()
