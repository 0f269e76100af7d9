"""Cutting a graph: the same values and memory, with the graph that made them left behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Cut", "LeafCut", "cut", "cut_leaf", "hollow", "is_start"]


class Cut:
    """The place where the gradient of a cut tensor arrives.

    Attributes:
        gradient: set by the backward that reaches the cut; None until then, or if it never does.
    """

    def __init__(self) -> None:
        self.gradient: Tensor | None = None


class LeafCut:
    """The place where the gradient of a leaf arrives."""

    def __init__(self, leaf: Tensor) -> None:
        self._leaf = leaf

    def is_at(self, leaf: Tensor) -> bool:
        """Tell whether this is the place of that leaf."""
        return leaf is self._leaf

    @property
    def gradient(self) -> Tensor | None:
        """Like ``Cut.gradient``."""
        return self._leaf.grad


class _Start(torch.autograd.Function):
    """First node of the new graph; ``token`` is there because a function needs an input that wants a gradient."""

    @staticmethod
    def forward(ctx: Any, cut: Cut, token: Tensor, tensor: Tensor) -> Tensor:
        ctx.cut = cut
        ctx.set_materialize_grads(False)
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None, None]:
        ctx.cut.gradient = gradient
        return None, None, None


def cut(tensor: Tensor) -> tuple[Tensor, Cut]:
    """Return the tensor at the start of a graph of its own, and the object that receives its gradient.

    Unlike ``detach().requires_grad_()`` it is no leaf, so that a layer may change it in place (``ReLU(inplace=True)``),
    as it may in a graph that was never cut.
    """
    end = Cut()
    token = torch.empty((), device=tensor.device, requires_grad=True, dtype=torch.float32)
    # Detached before the function as well, or the old graph would hang on the new one and run with absent gradients.
    return _Start.apply(end, token, tensor.detach()), end


def is_start(node: Any) -> bool:
    """Tell whether a node of a graph is the first one after a cut."""
    return type(node).__name__ == "_StartBackward"


def cut_leaf(tensor: Tensor, *, view: bool = False) -> tuple[Tensor, LeafCut]:
    """Like ``cut``, for a leaf. With ``view`` the result is a view, which autograd lets nobody change."""
    leaf = tensor.detach().requires_grad_()
    return (leaf.view_as(leaf) if view else leaf), LeafCut(leaf)


class _Hollow(torch.autograd.Function):
    """Identity of the gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return tensor.new_zeros(()).expand(tensor.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Tensor | None:
        return gradient


def hollow(tensor: Tensor) -> Tensor:
    """Return a tensor without values that a backward can begin with in place of this one, whose memory may be freed.

    It has the shape, dtype and device, but only one element. What the graph has saved of the tensor stays.
    """
    with torch.enable_grad():
        return _Hollow.apply(tensor)  # type: ignore[no-any-return]
