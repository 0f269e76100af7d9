"""The bytes that each device really holds in a step: its state, and what its actions allocate, storage by storage."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from spu.common.tracker import Tally
from spu.engine.build import Built

if TYPE_CHECKING:
    from spu.devices.manager import Device
    from spu.engine.runner import Runner

__all__ = ["counted_bytes", "peak_bytes", "state_bytes"]


@contextmanager
def counted_bytes(runner: Runner) -> Iterator[dict[str, int]]:
    """While active, workers count; the dict has the most bytes of each device, by name, when the block is left.

    What was there before is counted by what is known to be there: weights, optimizer state, and main gradients, which
    are made here if no step has made them yet, so that a first step holds what all others do. Counting slows a step
    down, so its times are not to be looked at. What a kernel allocates within itself is not seen.
    """
    peaks: dict[str, int] = {}
    stages, ranks = runner.built.stages, runner.engine.ranks
    tallies = [Tally() for _ in range(max(ranks) + 1)]
    for stage, rank in zip(stages, ranks):
        for parameter in stage.parameters():
            if parameter.requires_grad:
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
    for stage, rank in zip(stages, ranks):
        peaks[stage.device.name] = state[rank] + tallies[rank].peak


def state_bytes(built: Built, optimizers: list, ranks: list[int]) -> list[int]:
    """Bytes of weights and optimizer state on each rank, from the tensors themselves."""
    storages: list[dict[int, int]] = [{} for _ in range(max(ranks) + 1)]
    for stage, optimizer, rank in zip(built.stages, optimizers, ranks):
        tensors: list[torch.Tensor] = list(stage.parameters())
        if optimizer is not None:
            tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        storages[rank].update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors})
    return [sum(own.values()) for own in storages]


def peak_bytes(devices: Sequence[Device]) -> dict[str, int]:
    """The most memory in use so far: of each GPU by torch's allocator, and of the whole process for the CPU."""
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
