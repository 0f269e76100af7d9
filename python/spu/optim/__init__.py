"""Optimizers over fp32 main gradients."""

from __future__ import annotations

from spu.optim.adamw import AdamW, clip_coefficient
from spu.optim.master import MasterOptimizer

__all__ = ["AdamW", "MasterOptimizer", "clip_coefficient"]
