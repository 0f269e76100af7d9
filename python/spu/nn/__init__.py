"""Drop-in modules, and ``accelerate``: the same model on fused ops."""

from __future__ import annotations

from spu.nn.accelerate import accelerate, is_accelerated, restore
from spu.nn.embedding import Embedding
from spu.nn.linear import Linear
from spu.nn.norm import LayerNorm, RMSNorm

__all__ = ["Embedding", "LayerNorm", "Linear", "RMSNorm", "accelerate", "is_accelerated", "restore"]
