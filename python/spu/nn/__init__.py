"""Drop-in modules, and ``accelerate``: the same model on fused ops."""

from __future__ import annotations

from spu.nn.accelerate import accelerate, is_accelerated, restore
from spu.nn.linear import Linear

__all__ = ["Linear", "accelerate", "is_accelerated", "restore"]
