"""From a plan that streams to the stores, slots and regions that do it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from spu.common.dtypes import DTYPES, HALVES
from spu.common.heap import MIDDLE_BYTES, give_back, share_heaps, unmap_large_tensors
from spu.common.units import format_bytes
from spu.devices.manager import Device
from spu.devices.tiers import Tiers
from spu.engine.build import BuiltStages
from spu.engine.hosted import host_updated, in_turn, pinning_for
from spu.engine.stage import Stage
from spu.engine.streaming import Share, Streaming, streaming_units
from spu.memory.activations import ActivationStore
from spu.memory.device_store import DeviceStore
from spu.memory.disk_store import DiskStore
from spu.memory.host_store import HostStore
from spu.memory.slab import Slab
from spu.memory.spill import spilled
from spu.memory.store import Region, Store
from spu.memory.streamed import Streamed
from spu.memory.streams import Streams, streams_for
from spu.memory.unit import Unit, allocated
from spu.model.layers import Layer
from spu.nn.experts import multiplies_by_ours
from spu.optim.adamw import AdamW, MasterOptimizer
from spu.plan import Plan
from spu.precision import MainGrads

__all__ = ["converting", "open_streaming", "park_again", "spare_heap", "stream"]

_ROOMY = 0.8  # of the CPUs' budgets: what is left holds what the heap keeps beside
_ROOMY_FOR_EXPERTS = 0.6  # two devices took 1.4 times their plan with the usual heap, whose tensors have ever new sizes
_LEAST_BESIDE = 80 * 10**6  # a small mixture of experts; a larger one, a quarter of its plan (docs/planning.md: 0.22)


def converting(plan: Plan, tiers: Tiers) -> AbstractContextManager[None]:
    """Return a context for converting the model: beside a disk, what is new goes there instead of memory."""
    on_disk = plan.streaming is not None and plan.streaming.store == "disk" and tiers.disk is not None
    return spilled(str(tiers.disk)) if on_disk else nullcontext()


def spare_heap(plan: Plan, devices: Mapping[str, Device], layers: Sequence[Layer]) -> None:
    """Give back what planning and the conversion have left in the heap; where a plan needs nearly all that CPUs may
    use, let it keep little from now on (`spu.common.heap`).

    Tensors get mappings of their own then, all but the smallest, and threads share the heap. Otherwise it keeps what
    lay between tensors, a quarter of what is alive in fp32, and what a thread has freed: no plan counts that. (Where
    only large tensors had mappings, it kept 4% of the plan beside a mixture's activations of half a megabyte.) Where
    there is room, a step takes a seventh to a quarter less time with it.

    Args:
        devices: by their names in the plan.
        layers: the model's; a warning names experts in 16 bits that may take more than a budget has left.
    """
    peaks = zip(plan.devices, plan.predicted.peak_bytes, strict=True)
    held = {name: peak for name, peak in peaks if devices[name].torch_device.type == "cpu"}
    if held:
        give_back()
    planned, room = sum(held.values()), sum(devices[name].budget_bytes for name in held)
    experts = _experts(layers) if held else None
    if planned > (_ROOMY if experts is None else _ROOMY_FOR_EXPERTS) * room:
        unmap_large_tensors(MIDDLE_BYTES)
        share_heaps()
        beside = max(planned // 4, _LEAST_BESIDE)
        if experts is not None and planned + beside > room:
            warnings.warn(
                f"{experts} multiplies by torch's own products, with other numbers of rows each time: what torch keeps "
                f"for their shapes, and the heap, take up to {format_bytes(beside)} beside the {format_bytes(planned)} "
                f"that are planned, and the budgets are {format_bytes(room)}. Give budgets that leave as much free",
                stacklevel=2,
            )
    elif plan.streaming is not None:
        unmap_large_tensors()


def _experts(layers: Sequence[Layer]) -> str | None:
    """Return the first module that holds 16-bit matrices of several experts in one parameter, which torch's products
    multiply; None without one.
    """
    for layer in layers:
        for name, module in layer.module.named_modules():
            own = module.parameters(recurse=False)
            if type(module).__module__.startswith("torch.") or multiplies_by_ours(module):
                continue
            if any(p.dim() == 3 and p.dtype in HALVES for p in own):
                return f"{layer.name}.{name}" if name else layer.name
    return None


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
    firsts = built.stages[: len(plan.devices)]  # stage s is on rank s modulo their number
    strange = next((s.device.name for s in firsts if s.device.torch_device.type not in ("cpu", "cuda")), None)
    if strange is not None:
        raise ValueError(
            f"the plan streams to {strange}: only a CPU and CUDA devices can; give it the layers that fit it, "
            "with residency='resident'"
        )
    if how.store == "disk" and tiers.disk is None:
        raise ValueError("the plan streams from a disk: say which, tiers='disk=FOLDER:100GB'")
    _bring_to_memory(built, how.residency)
    stores: list[Store] = []
    try:
        for stage in firsts:
            stores.append(_store(how.store, tiers, stage.device.torch_device))
        streaming = stream(
            built,
            optimizers,
            main_grads,
            residencies=how.residency,
            stores=stores,
            slots=how.slots,
            buffers=how.state_slots,
            grads=DTYPES[plan.settings.grads],
            activations=None if how.activations == "keep" else how.activations,
            input_bytes=_input_bytes(plan),
        )
    except BaseException:
        for store in stores:
            store.close()
        raise
    for name, residency in zip(plan.devices, streaming.residencies, strict=True):
        if isinstance(residency.store, DeviceStore) and residency.store.note:
            warnings.warn(f"{name}: {residency.store.note}", stacklevel=2)
    return streaming


def _store(tier: str, tiers: Tiers, device: torch.device) -> Store:
    """Return a new store below a device; several share what the tier may use, as the plan has counted it."""
    if tier == "host":
        return HostStore(pinning_for(device), tiers.host_bytes or None)
    assert tiers.disk is not None
    tiers.disk.mkdir(parents=True, exist_ok=True)
    return DiskStore(tiers.disk, tiers.disk_bytes or None)


def _input_bytes(plan: Plan) -> list[list[int]]:
    """Return the bytes of every input that waits below, of all microbatches, by stage."""
    assert plan.streaming is not None
    count = plan.settings.run_microbatches
    return [[size for size in own for _ in range(count)] for own in plan.streaming.parked_bytes]


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
    stores: Sequence[Store],
    slots: int,
    buffers: int,
    grads: torch.dtype = torch.float32,
    activations: str | None = None,
    input_bytes: Sequence[Sequence[int]] = (),
    streams: Streams | None = None,
) -> Streaming:
    """Lay stages out in stores, and return what streams them; their tensors move there by `Streamed.fill`.

    Args:
        built, optimizers, main_grads: of all stages. Several devices take them in turn: stage s is on rank s modulo
            their number, so each weight crosses one device's link.
        residencies: of each stage: "resident", "offloaded" or "streamed".
        stores: below each device, new, without regions.
        slots: for weights, at least 2.
        buffers: for gradients and state, 1 or 2.
        grads: of gradients in a store: float32 or bfloat16.
        activations: how inputs of recomputed layers wait in the store: "exact" or a codec; None: on the device.
        input_bytes: of each of these inputs, by stage.
        streams: of the devices, if the host updates beside them; default: if they are GPUs.

    Raises:
        ValueError: an optimizer that cannot be streamed, or a parameter of stages of several devices.
        StoreError: no room.
    """
    count = len(stores)
    for use in built.tied:
        if use.owner_stage % count != use.stage % count:
            raise ValueError(
                f"stages {use.owner_stage} and {use.stage} share a parameter {tuple(use.owner.shape)}, and are on "
                "several devices that stream: give one device, or residency='resident'"
            )
    hosted = streams is not None or built.stages[0].device.torch_device.type != "cpu"
    units = streaming_units(built, residencies, optimizers, host_updates=hosted, grads=grads)
    shares = []
    for rank, store in enumerate(stores):
        stages = built.stages[rank::count]
        own = {index: unit for index, unit in units.items() if index % count == rank}
        inputs = [size for stage in input_bytes[rank::count] for size in stage] if activations else []
        own = _laid_out(own, stages, store, inputs, activations, above=hosted and not isinstance(store, HostStore))
        if not hosted:
            shares.append(Share(own, partial(_slots, store, slots, buffers)))
            continue
        device = stages[0].device.torch_device
        along = streams_for(device) if streams is None else streams
        how: dict[str, Any] = {"slots": slots, "buffers": buffers, "device": device, "streams": along}
        offloaded = {index for index in own if residencies[index] == "offloaded"}
        shares.append(Share(own, partial(_hosted, store, offloaded, how), along))
    return Streaming(built, optimizers, main_grads, shares)


def _laid_out(
    units: dict[int, Unit],
    stages: Sequence[Stage],
    store: Store,
    inputs: Sequence[int],
    activations: str | None,
    *,
    above: bool,
) -> dict[int, Unit]:
    """Return a rank's units with regions in its store; inputs of layers wait there too, or in the host's memory above
    it.
    """
    if not above:
        units, regions = allocated(units, store, inputs)
        _park(stages, store, regions, activations)
        return units
    units, _ = allocated(units, store)
    if inputs:
        memory = HostStore(pinning_for(stages[0].device.torch_device))
        _park(stages, memory, allocated({}, memory, inputs)[1], activations)
    return units


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
    count, sizes = len(plan.devices), _input_bytes(plan)
    stores: list[Store] = []
    regions = []
    try:
        for rank in range(count if how.activations != "keep" else 0):
            device = built.stages[rank].device.torch_device
            folder = tiers.disk if device.type == "cpu" else None
            stores.append(HostStore(pinning_for(device)) if folder is None else DiskStore(folder))
            inputs = [size for own in sizes[rank::count] for size in own]
            regions.append(allocated({}, stores[-1], inputs)[1])
    except BaseException:
        for store in stores:
            store.close()
        raise
    for stage in built.stages:
        stage.activations = None
    for rank, (store, found) in enumerate(zip(stores, regions)):
        _park(built.stages[rank::count], store, found, how.activations)
    streaming.park_in(stores)


def _park(
    stages: Sequence[Stage], store: Store, regions: Sequence[tuple[Region, int]], activations: str | None
) -> None:
    """Let inputs of recomputed layers of a rank's stages wait in regions of a store, if there are any."""
    if regions:
        codec = None if activations == "exact" else activations
        parked = ActivationStore(store, regions, stages[0].device.torch_device, codec=codec)
        for stage in stages:
            stage.activations = parked


def _slots(store: Store, slots: int, buffers: int, units: dict[int, Unit], work: Streaming) -> Streamed:
    count, slot_of = in_turn(units, slots)
    sizes = [max((u.weight_bytes for u in units.values() if slot_of[u.index] == k), default=0) for k in range(count)]
    largest = [max(unit.sum_bytes, unit.grad_bytes + unit.state_bytes) for unit in units.values()]
    sizes += [max(largest, default=0)] * buffers
    slab = Slab(sum(sizes))
    memory = slab.slots(sizes)
    return Streamed(units, store, memory[:count], memory[count:], work, slot_of)


def _hosted(
    store: Store, offloaded: set[int], how: dict[str, Any], units: dict[int, Unit], work: Streaming
) -> Streamed:
    return host_updated(units, store, work, offloaded=offloaded, **how)
