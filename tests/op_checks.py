"""What is asked of every fused op: its result and gradients, and that torch finds its registration whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from spu.ops import schema

Op = Callable[..., Tensor]


def with_grads(function: Op, tensors: list[Tensor], dy: Tensor, *args: Any) -> list[Any]:
    """The result and the gradient of each tensor, None where the result does not depend on it."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    y = function(*leaves, *args)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def leaves_of(values: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [value.to(dtype).requires_grad_() for value in values]


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The result and its gradients, for one that is the same in every dtype."""
    dy = torch.arange(y.numel()).view(y.shape).mul(0.7).cos().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def nodes(result: Tensor, *names: str) -> list[str]:
    """Return the nodes of a graph that have one of these names, sorted."""
    found, seen, left = [], set(), [result.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.append(type(node).__name__)
        left += [edge for edge, _ in node.next_functions]
    return sorted(name for name in found if name in names)


def assert_registered(backend: str, *cases: tuple[Any, ...]) -> None:
    """Schema, fake kernel and derivative of a backend's overloads hold for (name, arguments ...)."""
    for name, *arguments in cases:
        results = torch.library.opcheck(schema.overload(name, backend), tuple(arguments))
        assert set(results.values()) == {"SUCCESS"}, (name, results)
