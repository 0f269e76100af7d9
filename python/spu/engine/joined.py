"""fp32 values of 16-bit parameters beside corrections, made one at a time, when they are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from spu.checkpoint.writing import Elsewhere
from spu.optim.adamw import AdamW

__all__ = ["Joined", "whole"]


@dataclass(frozen=True)
class Joined:
    """The fp32 value of a parameter whose state has a correction (`spu.checkpoint.writing.Elsewhere`).

    All of them at once would be 4 bytes a parameter, which no plan counts.
    """

    parameter: nn.Parameter
    optimizer: AdamW

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def read(self) -> torch.Tensor:
        """Return the value, on the parameter's device, in memory of its own."""
        return self.optimizer.master(self.parameter)


def whole(value: torch.Tensor | Elsewhere) -> torch.Tensor:
    """Return a tensor, or what is elsewhere as one."""
    return value if isinstance(value, torch.Tensor) else value.read()
