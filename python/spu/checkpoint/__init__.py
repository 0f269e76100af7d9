"""Checkpoints that survive a crash at any moment: directories of tensors and metadata."""

from __future__ import annotations

from spu.checkpoint.reading import CheckpointError, Stored
from spu.checkpoint.writing import exists, load, opened, save

__all__ = ["CheckpointError", "Stored", "exists", "load", "opened", "save"]
