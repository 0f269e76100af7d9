"""From a plan that streams to the stores, slots and regions that do it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from spu.devices.tiers import Tiers
from spu.engine.build import BuiltStages
from spu.engine.streaming import Streaming, streaming_units
from spu.memory.activations import ActivationStore
from spu.memory.disk_store import DiskStore
from spu.memory.host_store import HostStore
from spu.memory.slab import Slab
from spu.memory.spill import spilled
from spu.memory.store import Store
from spu.memory.streamed import Streamed
from spu.memory.unit import Unit, allocated
from spu.optim.adamw import AdamW, MasterOptimizer
from spu.precision import MainGrads

if TYPE_CHECKING:
    from spu.plan import Plan

__all__ = ["converting", "open_streaming", "stream"]


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
    if any(stage.device.torch_device.type != "cpu" for stage in built.stages):
        raise ValueError(
            f"the plan streams to {plan.devices[0]}: only CPU devices stream so far, from a disk; give the GPU layers "
            "that fit it, with residency='resident'"
        )
    store: Store
    if how.store == "disk":
        if tiers.disk is None:
            raise ValueError("the plan streams from a disk: say which, tiers='disk=FOLDER:100GB'")
        tiers.disk.mkdir(parents=True, exist_ok=True)
        store = DiskStore(tiers.disk, tiers.disk_bytes or None)
    else:
        store = HostStore(limit_bytes=tiers.host_bytes or None)
    try:
        return stream(
            built,
            optimizers,
            main_grads,
            residencies=how.residency,
            store=store,
            slots=how.slots,
            buffers=how.state_slots,
            activations=None if how.activations == "keep" else how.activations,
            input_bytes=[size for size in how.parked_bytes for _ in range(plan.settings.run_microbatches)],
        )
    except BaseException:
        store.close()
        raise


def stream(
    built: BuiltStages,
    optimizers: Sequence[AdamW | MasterOptimizer | None],
    main_grads: Sequence[MainGrads],
    *,
    residencies: Sequence[str],
    store: Store,
    slots: int,
    buffers: int,
    activations: str | None = None,
    input_bytes: Sequence[int] = (),
) -> Streaming:
    """Lay stages out in a store, and return what streams them; their tensors move there by `Streamed.fill`.

    Args:
        built, optimizers, main_grads: of all stages.
        residencies: of each stage: "resident", "offloaded" or "streamed".
        store: new, without regions.
        slots: for weights, at least 2.
        buffers: for gradients and state, 1 or 2.
        activations: "exact", "fp16" or "int8": inputs of recomputed layers wait in the store; None: on the device.
        input_bytes: of each of these inputs.

    Raises:
        ValueError: an optimizer that cannot be streamed.
        StoreError: no room.
    """
    units, regions = allocated(
        streaming_units(built, residencies, optimizers), store, input_bytes if activations else ()
    )
    if regions:
        codec = None if activations == "exact" else activations
        parked = ActivationStore(store, regions, built.stages[0].device.torch_device, codec=codec)
        for stage in built.stages:
            stage.activations = parked
    return Streaming(built, optimizers, main_grads, units, partial(_slots, store, slots, buffers))


def _slots(store: Store, slots: int, buffers: int, units: dict[int, Unit], work: Streaming) -> Streamed:
    count = min(slots, max(units) + 1)
    sizes = [max((u.weight_bytes for u in units.values() if u.index % count == k), default=0) for k in range(count)]
    sizes += [max((unit.grad_bytes + unit.state_bytes for unit in units.values()), default=0)] * buffers
    slab = Slab(sum(sizes))
    memory = slab.slots(sizes)
    return Streamed(units, store, memory[:count], memory[count:], work)
