"""The memory of a device whose stages the host updates: slots on the device, and page-locked memory beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from spu.memory.chunks import CHUNK_BYTES, Chunks
from spu.memory.device_store import DeviceStore, Staging
from spu.memory.host_store import HostStore
from spu.memory.slab import Pinning, Slab, cuda_pinning
from spu.memory.store import Store
from spu.memory.streamed import Streamed
from spu.memory.streams import Streams
from spu.memory.unit import Unit
from spu.memory.work import Work

__all__ = ["host_updated", "in_turn", "pinning_for"]


def pinning_for(device: torch.device) -> Pinning | None:
    """Return how memory beside a device is page-locked; None beside a CPU."""
    return cuda_pinning(device) if device.type == "cuda" else None


def in_turn(units: Mapping[int, Unit], slots: int) -> tuple[int, dict[int, int]]:
    """Return how many slots are used of so many, and the slot of each unit: they take turns."""
    count = max(min(slots, len(units)), 1)
    return count, {index: k % count for k, index in enumerate(sorted(units))}


def host_updated(
    units: Mapping[int, Unit],
    store: Store,
    work: Work,
    *,
    slots: int,
    buffers: int,
    offloaded: Collection[int],
    device: torch.device,
    streams: Streams,
) -> Streamed:
    """Take the memory through which units come and go, and return what moves them.

    Args:
        units: by stage, their regions allocated in ``store``.
        store: the host's memory, or a disk: then as much memory of the host lies between.
        work: updates units.
        slots: for weights; they take turns.
        buffers: for gradients, and in the host for gradients and state that come from a disk.
        offloaded: stages whose weights do not share slots: each has one of its own on the device.
        device: where the stages compute.
        streams: of the device.

    Raises:
        StoreError: the host has not so much memory.
    """
    count, slot_of = in_turn(units, slots)
    slot_of.update((index, count + k) for k, index in enumerate(sorted(units.keys() & set(offloaded))))
    sizes = [0] * (1 + max([count - 1, *slot_of.values()]))
    for index, unit in units.items():
        sizes[slot_of[index]] = max(sizes[slot_of[index]], unit.weight_bytes)
    grads = [max((unit.sum_bytes for unit in units.values()), default=0)] * buffers
    memory = _on_device([*sizes, *grads], device)
    below, note = _device_store(units, store, slot_of, count, buffers, device, streams)
    below.note = note
    return Streamed(units, below, memory[: len(sizes)], memory[len(sizes) :], work, slot_of)


def _on_device(sizes: Sequence[int], device: torch.device) -> list[Tensor]:
    if device.type == "cpu":
        return Slab(sum(sizes)).slots(sizes)
    return [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]


def _device_store(
    units: Mapping[int, Unit],
    store: Store,
    slot_of: Mapping[int, int],
    count: int,
    buffers: int,
    device: torch.device,
    streams: Streams,
) -> tuple[DeviceStore, str]:
    """Return the way between a store and a device, and what keeps it from being page-locked; "" if nothing does."""
    pinning = pinning_for(device)
    if isinstance(store, HostStore):
        return DeviceStore(store, streams, chunks=_chunks(streams, pinning) if store.note else None), store.note
    places = [0] * count
    for index, unit in units.items():
        place = slot_of[index] % count
        places[place] = max(places[place], unit.weight_bytes)
    largest = max((unit.grad_bytes + unit.state_bytes for unit in units.values()), default=0)
    sizes = [*places, *[largest] * buffers]
    slab = Slab(sum(sizes), pinning, sizes)
    memory = slab.slots(sizes)
    return DeviceStore(store, streams, staging=Staging(memory[:count], memory[count:])), slab.note


def _chunks(streams: Streams, pinning: Pinning | None) -> tuple[Chunks, Chunks] | None:
    """Return two small page-locked buffers for each direction; None if not even these can be page-locked."""
    slab = Slab(4 * CHUNK_BYTES, pinning)
    if slab.note:
        return None
    memory = slab.slots([CHUNK_BYTES] * 4)
    return Chunks(streams, memory[:2]), Chunks(streams, memory[2:])
