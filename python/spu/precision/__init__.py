"""Mixed precision: the loss scale, and fp32 main gradients of 16-bit parameters."""

from __future__ import annotations

from spu.precision.grad_scaler import GradScaler
from spu.precision.main_grads import MainGrads
from spu.precision.scaler import LossScaler

__all__ = ["GradScaler", "LossScaler", "MainGrads"]
