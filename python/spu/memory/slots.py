"""The ring of host slots through which tensors go between a device and the regions of a store."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spu import ops
from spu.common.codecs import numel_of
from spu.memory.store import ALIGNMENT, Region, Store, StoreError, Ticket
from spu.transfer.side import Side
from spu.transfer.side import Ticket as Crossing

__all__ = ["Piece", "Record", "Ring", "rounded"]

_HOST = torch.device("cpu")


def rounded(nbytes: int) -> int:
    """Return bytes rounded up to what a store's regions are multiples of."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


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

    def copy_to(self, buffer: Tensor, device: torch.device) -> Tensor:
        """Copy the piece from a slot to a device: as a wire, or as new memory for the tensor."""
        memory = self.memory(buffer)
        if self.codec is not None:  # a CPU unpacks from the slot itself
            return memory if device.type == "cpu" else memory.to(device, non_blocking=True)
        return self._empty(device).copy_(memory, non_blocking=True)

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


@dataclass(eq=False)
class _Slot:
    """A slot, and what is going on in it.

    Attributes:
        buffer: uint8 on the host, aligned.
        record: whose bytes are in it, or will be.
        leaving: the copy from the device, which has to end before the slot is written to the store.
        ticket: the write, or the read.
        arriving: the copy to the device, begun ahead.
    """

    buffer: Tensor
    record: Record | None = None
    leaving: Crossing | None = None
    ticket: Ticket | None = None
    arriving: Crossing | None = None


class Ring:
    """Slots of one size, and the copies through them.

    Args:
        store: the tier.
        device: at the other end.
        side: where copies run beside the device's work; None: the calling thread copies.
        count: how many slots.
        size: bytes of a slot, at least those of any record.
    """

    def __init__(self, store: Store, device: torch.device, side: Side | None, count: int, size: int) -> None:
        self._store, self._device, self._side = store, device, side
        self._slots = [_Slot(_aligned(rounded(size), pinned=device.type == "cuda")) for _ in range(count)]
        self.count = count
        self.size_bytes = count * rounded(size)

    def write(self, record: Record, sources: Sequence[Tensor]) -> None:
        """Copy tensors or wires, one for each piece, to the record's region; they may be freed at once.

        Raises:
            StoreError: an earlier write has failed.
        """
        slot = self._take(())
        slot.record = record

        def copy() -> None:
            for piece, source in zip(record.pieces, sources, strict=True):
                piece.memory(slot.buffer).copy_(source, non_blocking=True)

        with torch.no_grad():
            if self._side is None:
                copy()
            else:
                slot.leaving = self._side.start(copy, list(sources))
        # Beside a GPU the host runs ahead: it waits for a copy only when half of the slots are on their way.
        waiting = [other for other in self._slots if other.leaving is not None]
        for other in waiting[: len(waiting) - self.count // 2] if self._side is not None else [slot]:
            self._write(other)

    def _write(self, slot: _Slot) -> None:
        assert slot.record is not None
        if slot.leaving is not None:
            slot.leaving.arrive(_HOST)
            slot.leaving = None
        slot.ticket = self._store.write(slot.record.region, slot.buffer[: slot.record.stored_bytes])

    def read(self, records: Sequence[Record]) -> None:
        """Start to read those of the records that are in no slot, into slots that hold none of them.

        Args:
            records: as many as there are slots, or fewer.
        """
        present = {id(slot.record) for slot in self._slots}
        for record in records:
            if id(record) not in present:
                slot = self._take(records)
                slot.record = record
                slot.ticket = self._store.read(record.region, slot.buffer[: record.stored_bytes])

    def begin(self, record: Record) -> None:
        """Start to copy a record to a GPU, ahead of `tensors`; the copy waits only for what the GPU has to do so far.

        Raises:
            StoreError: as for `tensors`.
        """
        slot = self._slot_of(record)
        if self._side is not None and slot.arriving is None:
            self._ready(slot)
            with torch.no_grad():
                slot.arriving = self._side.start(lambda: self._copies(slot), ())

    def tensors(self, record: Record) -> list[Tensor]:
        """Return a record's tensors in new memory of the device; `read` must have been called with it.

        Raises:
            StoreError: it could not be read, or had not been written.
        """
        self.begin(record)
        slot = self._slot_of(record)
        with torch.no_grad(), ops.use_backend(record.backend):
            if slot.arriving is None:
                self._ready(slot)
                arrived = self._copies(slot)
            else:
                arrived = slot.arriving.arrive(self._device)
                slot.arriving = None
            return [piece.unpacked(tensor) for piece, tensor in zip(record.pieces, arrived, strict=True)]

    def _copies(self, slot: _Slot) -> list[Tensor]:
        assert slot.record is not None
        return [piece.copy_to(slot.buffer, self._device) for piece in slot.record.pieces]

    def drop(self, record: Record) -> None:
        """Forget a record: its region may be used again.

        Raises:
            StoreError: it could not be written.
        """
        for slot in self._slots:
            if slot.record is record:
                self._settle(slot)
                slot.record = None

    def clear(self) -> None:
        """Forget all records; what is in progress ends first, well or not."""
        for slot in self._slots:
            with contextlib.suppress(StoreError):
                self._settle(slot)
            slot.record = slot.leaving = slot.ticket = slot.arriving = None

    def _slot_of(self, record: Record) -> _Slot:
        return next(slot for slot in self._slots if slot.record is record)

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

    def _settle(self, slot: _Slot) -> None:
        """Wait for what is in progress in a slot, so that it may be filled anew."""
        self._ready(slot)
        if slot.arriving is not None:
            slot.arriving.arrive(_HOST)
            slot.arriving = None

    def _ready(self, slot: _Slot) -> None:
        """Wait until a slot holds its record's bytes, and the store does."""
        if slot.leaving is not None:
            self._write(slot)
        ticket, slot.ticket = slot.ticket, None
        if ticket is not None:
            ticket.wait()


def _aligned(size: int, *, pinned: bool) -> Tensor:
    memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8, pin_memory=pinned)
    first = -memory.data_ptr() % ALIGNMENT
    return memory[first : first + size]
