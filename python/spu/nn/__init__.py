"""Drop-in modules, and ``accelerate``: the same model on fused ops."""

from __future__ import annotations

from .accelerate import accelerate, restore
from .linear import Linear

__all__ = ["Linear", "accelerate", "restore"]
