"""Gradients that autograd has put into the memory of others, or that keep more memory than their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spu.ops.sink import sink_of
from spu.precision.parameter_sink import ParameterSink, check_dense

__all__ = ["part_gradients"]


def part_gradients(parameters: Iterable[nn.Parameter], held: Iterable[Tensor | None] = ()) -> None:
    """Give gradients that lie in another one's memory a memory of their own; call it after a backward.

    A sum's backward has one tensor for both sides. Where a side is a view of a parameter (``a.view(3, 4) +
    b.view(3, 4)``, ``x + bias.view(1, 8)``), the parameter takes a view of that tensor as its gradient, and what the
    next backward adds to it is added to the other side's too (findings/views_share_gradient.sh).

    A concatenation's backward has views of one tensor for its sides. The gradient of a learnt prompt would keep that of
    the prompt and the data until the step's end (findings/concatenated_gradient_memory.sh); where parameters alone are
    concatenated, their gradients fill the memory, and stay.

    Args:
        parameters: those that had no gradient before the backward.
        held: gradients of the backward that somebody else still uses; they stay as they are.

    Raises:
        TypeError: a gradient is sparse.
    """
    taken = [_span(gradient) for gradient in held if gradient is not None and gradient.layout is torch.strided]
    made: list[tuple[Any, ...]] = []
    filled: dict[int, int] = {}  # bytes of a larger memory that gradients take
    for position, parameter in enumerate(parameters):
        gradient = parameter.grad
        if gradient is None:
            continue
        check_dense(gradient)
        memory, (start, stop) = gradient.untyped_storage(), _span(gradient)
        place = memory.data_ptr() if memory.nbytes() > stop - start and not _is_lent(parameter) else None
        if place is not None:
            filled[place] = filled.get(place, 0) + stop - start
        made.append((start, stop, position, parameter, place, memory.nbytes()))
    made.sort()
    end = 0
    for start, stop, _, parameter, place, size in made:
        shared = start < end or any(start < last and first < stop for first, last in taken)
        if shared or (place is not None and filled[place] < size):
            assert parameter.grad is not None
            parameter.grad = parameter.grad.clone()
        end = max(end, stop)


def _is_lent(parameter: nn.Parameter) -> bool:
    """Tell whether somebody has lent the gradient a part of a larger memory."""
    sink = sink_of(parameter)
    return isinstance(sink, ParameterSink) and sink.lent


def _span(tensor: Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    return start, start + tensor.nbytes
