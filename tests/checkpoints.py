"""Checkpoints that the tests of saving, damage and crashes make and look at."""

from __future__ import annotations

from pathlib import Path

import torch

from spu.checkpoint.writing import load, save


def some(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3, 4), float(step)), "step": torch.tensor(step)}


def step_at(path: Path) -> int:
    """The step of the checkpoint that :func:`some` made, which must be consistent in itself."""
    tensors, meta = load(path)
    assert list(tensors) == ["w", "step"]
    assert tensors["step"].item() == meta["step"]
    assert torch.equal(tensors["w"], torch.full((3, 4), float(meta["step"])))
    return int(meta["step"])


def save_step(path: Path, step: int) -> None:
    save(path, tensors=some(step), meta={"step": step})
