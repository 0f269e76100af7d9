"""Drop-in modules, and ``accelerate``: the same model on fused ops."""

from __future__ import annotations

from .accelerate import accelerate, is_accelerated, restore
from .linear import Linear

__all__ = ["Linear", "accelerate", "is_accelerated", "restore"]
