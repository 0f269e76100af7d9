"""Layers and losses that run out of memory as real ones do, when asked, at a place that is known."""

from __future__ import annotations

import weakref
from collections import UserList
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def starve() -> None:
    """Ask torch for more memory than there is anywhere."""
    torch.empty(1 << 60)


def is_real(x: Tensor) -> bool:
    """Whether the values are there: a planner runs layers on fake ones."""
    return type(x) is Tensor and x.device.type != "meta"


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, layer: Starved) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.layer, ctx.rows = layer, len(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.rows > ctx.layer.backward_rows:
            starve()
        return gradient, None, None


class Starved(nn.Module):
    """A linear layer that fails for want of memory with more rows than it is allowed.

    Args:
        rows: most rows of a forward.
        backward_rows: most rows of a backward.
        graphs: most graphs that may be alive.

    Attributes:
        seen: rows of each forward with values.
        alive: references to memory that the graphs keep.
    """

    def __init__(
        self, rows: int = 1 << 30, backward_rows: int = 1 << 30, graphs: int = 1 << 30, width: int = 16
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.rows, self.backward_rows, self.graphs = rows, backward_rows, graphs
        self.seen: UserList[int] = UserList()  # of a plain list a recomputation takes out what it has put in
        self.alive: list[weakref.ref[np.ndarray]] = []

    def forward(self, x: Tensor) -> Tensor:
        if not is_real(x):
            return self.linear(x)
        self.seen.append(len(x))
        if len(x) > self.rows:
            starve()
        self.alive = [reference for reference in self.alive if reference() is not None]
        if len(self.alive) >= self.graphs:
            starve()
        kept = np.zeros(1)
        self.alive.append(weakref.ref(kept))
        return _Keep.apply(self.linear(x), torch.from_numpy(kept), self)


class StarvedLoss(nn.Module):
    """A cross-entropy that fails with more rows than it is allowed."""

    ignore_index = -100

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if is_real(outputs) and len(outputs) > self.rows:
            starve()
        return F.cross_entropy(outputs, targets)
