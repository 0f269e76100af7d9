"""Activations between layers, in the tier below the device from their forward until their backward.

With recompute, a layer keeps one thing from its forward to its backward: its input. When all microbatches go through a
stage before the next one begins, that is one input for each stage and microbatch, all at one time. Here they are copied
to regions of a store as soon as the layer has run, as they are or packed, and come back before the layer runs again::

    forward     the layer has run -> its input is copied -> the device's memory is free -> the copy is written below
    backward    the next inputs are read, in the order of the backward -> copied to the device -> the layer runs again

Beside a GPU the tier below is the host's memory, and a side stream copies to it and from it. A CPU, whose tier below is
a disk, copies to a few fixed slots, which the store writes and reads in the background.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spu import ops
from spu.common.codecs import ALIGN_BYTES, codec_of
from spu.common.dtypes import STORAGE
from spu.common.wire import MAX_NDIM, wire_bytes
from spu.memory.host_store import HostStore
from spu.memory.slab import aligned
from spu.memory.slots import Homes, Piece, Record, Ring, Way
from spu.memory.store import Region, Store
from spu.transfer.side import side_for

__all__ = ["ActivationStore", "Counts", "Place"]

_SLOTS = 3  # inputs that are on their way between a CPU and a store at one time

Place = tuple[int, int, int]
"""Whose input it is: the stage's index, the microbatch's number, the layer's position in the stage."""


@dataclass
class Counts:
    """What was parked since the store was made, in bytes.

    Attributes:
        parked: what the parked tensors took on the device.
        stored: what they took below.
        kept: of inputs that stayed on the device: no region was free or large enough, a layer hands its input on,
            elements of a tensor share their places, or one lies on another device.
    """

    parked: int = 0
    stored: int = 0
    kept: int = 0


class ActivationStore:
    """Holds the inputs of recomputed layers in a tier below, and brings them back in the order of the backward.

    Used by the thread of one rank, and by the backward that it waits for. An input for which no region is left, or
    none is large enough, stays on the device: the backward is right all the same, and ``counts.kept`` tells. So
    does one with a tensor of another device.

    Args:
        store: the tier.
        regions: of the store, each with its bytes (`spu.memory.unit.allocated`); one is needed for every layer's input
            of every microbatch.
        device: where the stages compute.
        codec: what packs values that need a gradient; None: they come back bit for bit. What needs none, what is
            smaller as it is, and (on a CPU, where it is known) what would not be finite, is never packed.

    Attributes:
        counts: what it has done so far.
        codec: as given.
        slot_bytes: bytes of all slots.
        region_bytes: bytes of all regions.

    Raises:
        ValueError: an unknown codec, no region, or a GPU above anything but the host's memory.
    """

    def __init__(
        self,
        store: Store,
        regions: Sequence[tuple[Region, int]],
        device: torch.device,
        *,
        codec: str | None = None,
    ) -> None:
        if codec is not None:
            codec_of(codec)
        if not regions:
            raise ValueError("an ActivationStore needs a region for every stage and microbatch, got none")
        self.counts = Counts()
        self.codec = codec
        self._device = device
        self._free = sorted((size, region) for region, size in regions)
        self._way: Way
        if isinstance(store, HostStore):
            self._way = Homes(store, device, side_for(device, torch.device("cpu")))
        elif device.type == "cpu":
            self._way = Ring(store, _SLOTS, self._free[-1][0])
        else:
            raise ValueError(f"activations of {device} wait in the host's memory: give a HostStore, not {store!r}")
        self.slot_bytes = self._way.size_bytes
        self.region_bytes = sum(size for _, size in regions)
        self._records: dict[Place, Record] = {}
        self._order: list[tuple[int, int, int]] = []  # of `_turn`

    def park(
        self, place: Place, tensors: Sequence[Tensor], exact: Sequence[bool], staying_bytes: int
    ) -> _Parked | None:
        """Take a layer's input; see `spu.model.kept.Park`.

        Args:
            place: whose input it is; not parked yet.
            tensors, exact, staying_bytes: as for ``Park``.

        Raises:
            StoreError: an earlier write has failed.
        """
        assert place not in self._records, f"{place} is parked already"
        self.counts.kept += staying_bytes
        if not tensors:
            return None
        bytes_before = sum(t.numel() * t.element_size() for t in tensors)
        # One of the host's would come back to the card, after the host had written to a region that a card still reads.
        if any(tensor.device != self._device for tensor in tensors):
            self.counts.kept += bytes_before
            return None
        pieces, sources = self._pieces(tensors, exact)
        stored = aligned(pieces[-1].offset + pieces[-1].nbytes)
        index = bisect_left(self._free, (stored, -1))
        if index == len(self._free):
            self.counts.kept += bytes_before
            return None
        size, region = self._free.pop(index)
        record = Record(region, size, stored, pieces, ops.forced_backend())
        self._records[place] = record
        insort(self._order, _turn(place))
        self._way.write(record, sources)
        self.counts.parked += bytes_before
        self.counts.stored += stored
        return _Parked(self, place)

    def _pieces(self, tensors: Sequence[Tensor], exact: Sequence[bool]) -> tuple[list[Piece], list[Tensor]]:
        pieces: list[Piece] = []
        sources: list[Tensor] = []
        end = 0
        for tensor, as_is in zip(tensors, exact, strict=True):
            codec = None if as_is else self._codec_of(tensor)
            source = tensor
            if codec is not None:
                packed = ops.pack(tensor, codec)
                # A GPU's wire is not checked: the host would wait for it.
                if tensor.is_cuda or ops.is_finite_wire(packed, tensor.shape, tensor.dtype, codec=codec):
                    source = packed
                else:
                    codec = None
            nbytes = source.numel() * source.element_size()
            pieces.append(Piece(end, nbytes, tensor.shape, tensor.stride(), tensor.dtype, codec))
            sources.append(source)
            end += -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
        return pieces, sources

    def _codec_of(self, tensor: Tensor) -> str | None:
        if self.codec is None or tensor.dtype not in STORAGE or tensor.dim() > MAX_NDIM:
            return None
        smaller = wire_bytes(tensor.shape, tensor.dtype, self.codec) < tensor.numel() * tensor.element_size()
        return self.codec if smaller else None

    def tensors(self, place: Place) -> list[Tensor]:
        """Return a parked input in new memory of the device, and start to read the ones that come after it.

        Raises:
            StoreError: it could not be read.
        """
        following = self._following(place)
        self._way.read(following)
        tensors = self._way.tensors(following[0])
        if len(following) > 1:
            self._way.begin(following[1])
        return tensors

    def release(self, stage: int, microbatch: int) -> None:
        """Let go of what a microbatch has parked in a stage, whose backward has run, and read ahead.

        Raises:
            StoreError: a write has failed.
        """
        done = [turn for turn in self._order if turn[:2] == (-stage, microbatch)]
        for turn in done:
            self._way.drop(self._records[_place(turn)])
            self._forget(turn)
        self._way.read(self._following(_place(done[0]) if done else (stage, microbatch, 0)))

    def clear(self) -> None:
        """Let go of everything, after a failure; what is in progress ends first, well or not."""
        self._way.clear()
        for turn in list(self._order):
            self._forget(turn)

    def _forget(self, turn: tuple[int, int, int]) -> None:
        record = self._records.pop(_place(turn))
        self._order.remove(turn)
        insort(self._free, (record.region_bytes, record.region))

    def _following(self, place: Place) -> list[Record]:
        """Return the records of this place, if there is one, and of those whose backward comes next."""
        first = bisect_left(self._order, _turn(place))
        return [self._records[_place(turn)] for turn in self._order[first : first + self._way.ahead]]


class _Parked:
    """A parked input, as `spu.model.kept.Parked`."""

    def __init__(self, store: ActivationStore, place: Place) -> None:
        self._store = store
        self._place = place

    def tensors(self) -> list[Tensor]:
        return self._store.tensors(self._place)


def _turn(place: Place) -> tuple[int, int, int]:
    """Return a key by which places sort into the order of the backward: the last stage first, its last layer first."""
    stage, microbatch, layer = place
    return -stage, microbatch, -layer


def _place(turn: tuple[int, int, int]) -> Place:
    return -turn[0], turn[1], -turn[2]
