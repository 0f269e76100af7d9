"""``ModelParallelTrainer``: a model planned on its devices, built as stages and stepped; its parts run by hand."""

from __future__ import annotations

from spu.trainer.trainer import ModelParallelTrainer, StepResult, cross_entropy

__all__ = ["ModelParallelTrainer", "StepResult", "cross_entropy"]
