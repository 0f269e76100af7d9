"""Mixed precision: the loss scale, and fp32 main gradients of 16-bit parameters."""

from __future__ import annotations

from .grad_scaler import GradScaler
from .main_grads import MainGrads
from .scaler import LossScaler

__all__ = ["GradScaler", "LossScaler", "MainGrads"]
