"""The bytes that a step took, device by device: counted from tensors, and as the system says."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from spu.common.tracker import Tally
from spu.devices.manager import Device
from spu.engine.build import BuiltStages
from spu.engine.runner import Runner
from spu.memory.activations import ActivationStore
from spu.memory.device_store import DeviceStore
from spu.memory.disk_store import DiskStore
from spu.memory.streamed import Streamed
from spu.optim.adamw import AdamW, MasterOptimizer

__all__ = ["counted_bytes", "peak_bytes", "state_bytes"]


@contextmanager
def counted_bytes(runner: Runner) -> Iterator[dict[str, int]]:
    """Count bytes while the block runs; at its end the dict has each device's peak, by name.

    Memory from before the block is counted from known tensors: weights, optimizer state, and main gradients. Main
    gradients are allocated here if there are none yet, so that a first step holds as much as all others. Of stages that
    are streamed the slots count, and what lies below them counts for the store's tier, "host" or "disk". Counting slows
    a step down: its times are not usable. Memory that a kernel allocates internally is not counted, and nothing of
    stages in other processes.
    """
    peaks: dict[str, int] = {}
    stages, ranks = runner.built.stages, runner.engine.ranks
    tallies = [Tally() for _ in range(max(ranks) + 1)]
    streaming = runner.updater.streaming
    here = [(stage, rank) for stage, rank in zip(stages, ranks) if rank in runner.engine.here]
    for stage, rank in here:
        for parameter in stage.parameters():
            if parameter.requires_grad and (streaming is None or stage.index not in streaming):
                if parameter.grad is None:
                    parameter.grad_dtype = torch.float32  # type: ignore[attr-defined]
                    parameter.grad = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
                tallies[rank].add(parameter.grad)
    runner.engine.tallies = tallies
    try:
        yield peaks
    finally:
        runner.engine.tallies = None
    state = state_bytes(runner.built, runner.updater.optimizers, ranks)
    for stage, rank in here:
        peaks[stage.device.name] = state[rank] + tallies[rank].peak
    if streaming is not None:
        first = [stages[ranks.index(rank)] for rank in range(len(streaming.residencies))]
        below: Counter[str] = Counter()
        for stage, residency in zip(first, streaming.residencies, strict=True):
            device, tiers = _streamed_bytes(residency, stage.activations)
            peaks[stage.device.name] += device + streaming.hidden_bytes(residency.units)
            below.update(tiers)
        peaks.update(below)


def _streamed_bytes(moving: Streamed, parked: ActivationStore | None) -> tuple[int, dict[str, int]]:
    """Return the bytes that streaming takes on the device, and those in each tier below."""
    slots, waiting = (0, 0) if parked is None else (parked.slot_bytes, parked.region_bytes)
    store = moving.store
    if isinstance(store, DeviceStore):  # what is on its way, and what waits, lies in the host's memory
        tiers = {"host": store.own_bytes + slots + waiting}
        tier = "disk" if isinstance(store.below, DiskStore) else "host"
        return moving.slot_bytes, tiers | {tier: tiers.get(tier, 0) + moving.stored_bytes}
    own = store.own_bytes if isinstance(store, DiskStore) else 0
    tier = "disk" if isinstance(store, DiskStore) else "host"
    return moving.slot_bytes + slots + own, {tier: moving.stored_bytes + waiting}


def state_bytes(
    built: BuiltStages, optimizers: Sequence[AdamW | MasterOptimizer | None], ranks: Sequence[int]
) -> list[int]:
    """Return the bytes of weights and optimizer state on each rank, from the tensors themselves."""
    storages: list[dict[int, int]] = [{} for _ in range(max(ranks) + 1)]
    for stage, optimizer, rank in zip(built.stages, optimizers, ranks):
        tensors: list[torch.Tensor] = list(stage.parameters())
        if isinstance(optimizer, MasterOptimizer):
            tensors += optimizer.tensors()
        elif optimizer is not None:
            tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        # Not the stand-ins of what is below, which all are at address 0 and say how large they would be.
        here = (t.untyped_storage() for t in tensors if not t.is_meta)
        storages[rank].update({storage.data_ptr(): storage.nbytes() for storage in here})
    return [sum(own.values()) for own in storages]


def peak_bytes(devices: Sequence[Device]) -> dict[str, int]:
    """Return the peak bytes so far: of each GPU by torch's allocator, and of the whole process for the CPU."""
    peaks = {}
    for device in devices:
        if device.torch_device.type == "cuda":
            peaks[device.name] = torch.cuda.max_memory_allocated(device.torch_device)
        else:
            peaks["cpu"] = _peak_resident_bytes()
    return peaks


def _peak_resident_bytes() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
