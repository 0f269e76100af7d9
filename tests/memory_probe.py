"""The bytes that a trainer's devices really hold in a step, counted storage by storage."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from spu.engine.local import LocalEngine
from spu.tracker import MemoryTracker, Tally


@contextmanager
def counted_actions() -> Iterator[dict[str, Tally]]:
    """While active, every worker thread counts what its actions allocate; by device name."""
    tallies: dict[str, Tally] = {}
    run_actions = LocalEngine._run_actions

    def counted(self: LocalEngine, *args: Any) -> None:
        name = threading.current_thread().name.removeprefix("spu ").rpartition("_")[0]
        with MemoryTracker(tallies.setdefault(name, Tally())):
            run_actions(self, *args)

    LocalEngine._run_actions = counted  # type: ignore[method-assign]
    try:
        yield tallies
    finally:
        LocalEngine._run_actions = run_actions  # type: ignore[method-assign]


def state_bytes(trainer: Any) -> dict[str, int]:
    """Weights and optimizer state by device name, from the tensors themselves, after a step."""
    runner = trainer._runner
    counts: dict[str, int] = {}
    for stage, optimizer in zip(runner.built.stages, runner.updater.optimizers):
        tensors: list[torch.Tensor] = list(stage.parameters())
        if optimizer is not None:
            tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        counts[stage.device.name] = counts.get(stage.device.name, 0) + sum(storages.values())
    return counts


def measured_peaks(trainer: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, int]:
    """Peak bytes of each device in the second of two steps: the first one makes what is kept, such as gradients."""
    with counted_actions() as tallies:
        trainer.step(*batch)
        for tally in tallies.values():
            tally.restart()
        trainer.step(*batch)
    state = state_bytes(trainer)
    return {name: state[name] + tallies[name].peak for name in state}
