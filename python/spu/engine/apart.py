"""Gradients that autograd has put into the memory of others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from spu.precision.parameter_sink import check_dense

__all__ = ["part_gradients"]


def part_gradients(parameters: Iterable[nn.Parameter], held: Iterable[Tensor | None] = ()) -> None:
    """Give gradients that lie in another one's memory a memory of their own; call it after a backward.

    A sum's backward has one tensor for both sides. Where a side is a view of a parameter (``a.view(3, 4) +
    b.view(3, 4)``, ``x + bias.view(1, 8)``), the parameter takes a view of that tensor as its gradient, and what the
    next backward adds to it is added to the other side's too (findings/views_share_gradient.sh).

    Args:
        parameters: those that had no gradient before the backward.
        held: gradients of the backward that somebody else still uses; they stay as they are.

    Raises:
        TypeError: a gradient is sparse.
    """
    taken = [_span(gradient) for gradient in held if gradient is not None and gradient.layout is torch.strided]
    made = []
    for position, parameter in enumerate(parameters):
        if parameter.grad is not None:
            check_dense(parameter.grad)
            made.append((*_span(parameter.grad), position, parameter))
    made.sort()
    end = 0
    for start, stop, _, parameter in made:
        if start < end or any(start < last and first < stop for first, last in taken):
            assert parameter.grad is not None
            parameter.grad = parameter.grad.clone()
        end = max(end, stop)


def _span(tensor: Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    return start, start + tensor.nbytes
