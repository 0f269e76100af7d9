"""The bytes that a trainer's devices really hold in a step, counted storage by storage."""

from __future__ import annotations

from typing import Any

import torch

from spu.engine.counted import counted_bytes


def measured_peaks(trainer: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, int]:
    """Peak bytes of each device in a trainer's second step, by name."""
    trainer.step(*batch)
    with counted_bytes(trainer._runner) as peaks:
        trainer.step(*batch)
    return peaks
