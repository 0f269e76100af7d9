"""From a plan that streams to the stores, slots and regions that do it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from spu.common.dtypes import DTYPES
from spu.common.heap import unmap_large_tensors
from spu.devices.tiers import Tiers
from spu.engine.build import BuiltStages
from spu.engine.hosted import host_updated, pinning_for
from spu.engine.streaming import Streaming, streaming_units
from spu.memory.activations import ActivationStore
from spu.memory.device_store import DeviceStore
from spu.memory.disk_store import DiskStore
from spu.memory.host_store import HostStore
from spu.memory.slab import Slab, aligned
from spu.memory.spill import spilled
from spu.memory.store import Region, Store
from spu.memory.streamed import Streamed
from spu.memory.streams import Streams, streams_for
from spu.memory.unit import Unit, allocated
from spu.optim.adamw import AdamW, MasterOptimizer
from spu.precision import MainGrads

if TYPE_CHECKING:
    from spu.plan import Plan

__all__ = ["converting", "open_streaming", "park_again", "stream"]


def converting(plan: Plan, tiers: Tiers) -> AbstractContextManager[None]:
    """Return a context for converting the model: beside a disk, what is new goes there instead of memory."""
    on_disk = plan.streaming is not None and plan.streaming.store == "disk" and tiers.disk is not None
    return spilled(str(tiers.disk)) if on_disk else nullcontext()


def open_streaming(
    plan: Plan,
    tiers: Tiers,
    built: BuiltStages,
    optimizers: Sequence[AdamW | MasterOptimizer | None],
    main_grads: Sequence[MainGrads],
) -> Streaming:
    """Take the room that a plan has counted, on every tier, and return what streams its stages.

    Raises:
        ValueError: the plan needs a disk and none was given; a device or an optimizer that cannot stream.
        StoreError: there is no room, before anything has moved.
    """
    how = plan.streaming
    assert how is not None
    unmap_large_tensors()
    device = built.stages[0].device.torch_device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"the plan streams to {plan.devices[0]}: only a CPU and CUDA devices can; give it the layers that fit it, "
            "with residency='resident'"
        )
    _bring_to_memory(built, how.residency)
    store: Store
    if how.store == "disk":
        if tiers.disk is None:
            raise ValueError("the plan streams from a disk: say which, tiers='disk=FOLDER:100GB'")
        tiers.disk.mkdir(parents=True, exist_ok=True)
        store = DiskStore(tiers.disk, tiers.disk_bytes or None)
    else:
        store = HostStore(pinning_for(device), tiers.host_bytes or None)
    try:
        streaming = stream(
            built,
            optimizers,
            main_grads,
            residencies=how.residency,
            store=store,
            slots=how.slots,
            buffers=how.state_slots,
            grads=DTYPES[plan.settings.grads],
            activations=None if how.activations == "keep" else how.activations,
            input_bytes=[size for size in how.parked_bytes for _ in range(plan.settings.run_microbatches)],
        )
    except BaseException:
        store.close()
        raise
    if isinstance(streaming.residency.store, DeviceStore) and streaming.residency.store.note:
        warnings.warn(f"{plan.devices[0]}: {streaming.residency.store.note}", stacklevel=2)
    return streaming


def _bring_to_memory(built: BuiltStages, residencies: Sequence[str]) -> None:
    """Give weights that stay on a CPU memory of their own: `converting` and `spilled` have made them in files, whose
    pages the system would write to the disk after every update.
    """
    for stage, residency in zip(built.stages, residencies, strict=True):
        if residency != "streamed" and stage.device.torch_device.type == "cpu":
            for parameter in stage.parameters():
                parameter.data = parameter.data.clone()


def stream(
    built: BuiltStages,
    optimizers: Sequence[AdamW | MasterOptimizer | None],
    main_grads: Sequence[MainGrads],
    *,
    residencies: Sequence[str],
    store: Store,
    slots: int,
    buffers: int,
    grads: torch.dtype = torch.float32,
    activations: str | None = None,
    input_bytes: Sequence[int] = (),
    streams: Streams | None = None,
) -> Streaming:
    """Lay stages out in a store, and return what streams them; their tensors move there by `Streamed.fill`.

    Args:
        built, optimizers, main_grads: of all stages.
        residencies: of each stage: "resident", "offloaded" or "streamed".
        store: new, without regions.
        slots: for weights, at least 2.
        buffers: for gradients and state, 1 or 2.
        grads: of gradients in the store: float32 or bfloat16.
        activations: how inputs of recomputed layers wait in the store: "exact" or a codec; None: on the device.
        input_bytes: of each of these inputs.
        streams: of the device, if the host updates beside it; default: if it is a GPU.

    Raises:
        ValueError: an optimizer that cannot be streamed.
        StoreError: no room.
    """
    device = built.stages[0].device.torch_device
    if streams is None and device.type != "cpu":
        streams = streams_for(device)
    units = streaming_units(built, residencies, optimizers, host_updates=streams is not None, grads=grads)
    inputs = input_bytes if activations else ()
    if streams is None or isinstance(store, HostStore):
        units, regions = allocated(units, store, inputs)
        _park(built, store, regions, activations)
    else:  # inputs of layers wait in the host's memory, above the disk
        units, _ = allocated(units, store)
        if inputs:
            memory = HostStore(pinning_for(device))
            sizes = [aligned(size) for size in inputs]
            found = memory.allocate([f"activation {k}" for k in range(len(sizes))], sizes)
            _park(built, memory, list(zip(found, sizes, strict=True)), activations)
    make: Callable[[dict[int, Unit], Streaming], Streamed]
    if streams is None:
        make = partial(_slots, store, slots, buffers)
    else:
        how: dict[str, Any] = {"slots": slots, "buffers": buffers, "device": device, "streams": streams}
        offloaded = {index for index in units if residencies[index] == "offloaded"}
        make = partial(_hosted, store, offloaded, how)
    return Streaming(built, optimizers, main_grads, units, make, streams)


def park_again(plan: Plan, tiers: Tiers, built: BuiltStages, streaming: Streaming) -> None:
    """Let inputs of recomputed layers wait where a changed plan has them: on the device, or in a store of their own.

    Args:
        plan: with the stages that are built.
        tiers: what there is below.
        built: the stages, which do not run.
        streaming: of them; closes the store.

    Raises:
        StoreError: there is no room; the inputs wait where they did.
    """
    how = plan.streaming
    assert how is not None
    device = built.stages[0].device.torch_device
    store: Store | None = None
    if how.activations != "keep":
        if device.type == "cpu" and tiers.disk is not None:
            store = DiskStore(tiers.disk)
        else:
            store = HostStore(pinning_for(device))
        sizes = [aligned(size) for size in how.parked_bytes for _ in range(plan.settings.run_microbatches)]
        try:
            regions = store.allocate([f"activation {k}" for k in range(len(sizes))], sizes)
        except BaseException:
            store.close()
            raise
    for stage in built.stages:
        stage.activations = None
    if store is not None:
        _park(built, store, list(zip(regions, sizes, strict=True)), how.activations)
    streaming.park_in(store)


def _park(built: BuiltStages, store: Store, regions: Sequence[tuple[Region, int]], activations: str | None) -> None:
    """Let inputs of recomputed layers wait in regions of a store, if there are any."""
    if regions:
        codec = None if activations == "exact" else activations
        parked = ActivationStore(store, regions, built.stages[0].device.torch_device, codec=codec)
        for stage in built.stages:
            stage.activations = parked


def _slots(store: Store, slots: int, buffers: int, units: dict[int, Unit], work: Streaming) -> Streamed:
    count = min(slots, max(units) + 1)
    sizes = [max((u.weight_bytes for u in units.values() if u.index % count == k), default=0) for k in range(count)]
    largest = [max(unit.sum_bytes, unit.grad_bytes + unit.state_bytes) for unit in units.values()]
    sizes += [max(largest, default=0)] * buffers
    slab = Slab(sum(sizes))
    memory = slab.slots(sizes)
    return Streamed(units, store, memory[:count], memory[count:], work)


def _hosted(
    store: Store, offloaded: set[int], how: dict[str, Any], units: dict[int, Unit], work: Streaming
) -> Streamed:
    return host_updated(units, store, work, offloaded=offloaded, **how)
