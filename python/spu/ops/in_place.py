"""Weight gradients outside a loss scale's scope: the product's kernel adds them to the parameter's ``grad``.

Autograd would add a gradient of its own memory to that tensor, in place. Here the kernel does it as it stores its fp32
sums, with the same bits: grad + sum, rounded once. What can see the difference takes the ordinary way: hooks, the
anomaly mode, whoever holds the parameter's AccumulateGrad node, a gradient that is asked for as a result. A weight that
is used several times gets its gradients one after the other, not their sum.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from spu.common.torch_private import backward_hooks, post_accumulate_hooks
from spu.ops import schema
from spu.ops.sink import (
    GradSink,
    accumulates,
    current_scope,
    may_be_main_grad,
    place_of,
    sink_of,
    sinks_of,
)

__all__ = ["weight_sinks_of"]

_LOCKS = tuple(threading.Lock() for _ in range(64))  # backwards in several threads may add to the same gradient

_UNHELD = 2  # references to the Python object of a node that is made for the question


class _InPlace:
    """What fused ops ask of the `GradSink` of a matrix, or of experts' matrices: adds their gradient to ``grad``, which
    `_adds` has seen.
    """

    def __init__(self, grad: Tensor) -> None:
        self.grad = grad

    def linear_weight(self, dz: Tensor, x: Tensor, backend: str) -> None:
        self.linear_weights((), (dz,), x, backend)

    def linear_weights(self, others: Sequence[GradSink], dzs: Sequence[Tensor], x: Tensor, backend: str) -> None:
        grads = [self.grad, *(cast(_InPlace, sink).grad for sink in others)]
        one = torch.ones(1, dtype=torch.float32, device="cpu")
        with _locked(grads):
            if len(dzs) == 1:
                schema.overload("linear_dw_", backend)(dzs[0], x, grads[0], one, torch.zeros_like(one), True)
            else:
                schema.overload("linear_dw_each_", backend)(dzs, x, grads, one, torch.zeros_like(one), True)
            increment_version(grads)

    def experts_weight(self, dzs: Sequence[Tensor], x: Tensor, ends: Tensor, backend: str) -> None:
        one = torch.ones(1, dtype=torch.float32, device="cpu")
        with _locked([self.grad]):
            schema.overload("experts_dw_", backend)(dzs, x, ends, self.grad, one, torch.zeros_like(one), True)
            increment_version(self.grad)


@contextmanager
def _locked(grads: Sequence[Tensor]) -> Iterator[None]:
    with ExitStack() as locks:
        for place in sorted({(id(grad) >> 5) % len(_LOCKS) for grad in grads}):
            locks.enter_context(_LOCKS[place])
        yield


def _is_held(node: Any, place: int) -> bool:
    """Tell whether Python code holds the node that a node's input came from, and so may have hung hooks on it."""
    return sys.getrefcount(node.next_functions[place][0]) > _UNHELD


def _adds(node: Any, param: Tensor) -> bool:
    """Tell whether autograd would add to the ``grad`` of an fp32 matrix, and nothing else would see what."""
    grad = param.grad
    if (
        grad is None
        or type(grad) is not Tensor
        or not may_be_main_grad(grad, param)
        or grad.requires_grad
        or grad.is_inference()
        or backward_hooks(param)
        or post_accumulate_hooks(param)
        or sink_of(param) is not None  # of a scope that this backward does not have: its hook sees to the gradient
    ):
        return False
    place = place_of(node, param)
    return not _is_held(node, place) and accumulates(node.next_functions[place][0])


def weight_sinks_of(node: Any, parameters: Sequence[Tensor | None], backend: str) -> list[GradSink | None]:
    """Return ``sinks_of`` inside a scope. Outside, return for each fp32 matrix on a CPU, or experts' matrices in one
    parameter, what adds to the ``grad`` that it has, None for all else: vectors, other devices, and the reference
    backend, which adds up as autograd does.
    """
    if current_scope() is not None:
        return sinks_of(node, parameters)
    found: list[GradSink | None] = [None for _ in parameters]
    if backend == "reference" or torch.is_anomaly_enabled():
        return found
    for i, param in enumerate(parameters):
        if param is None or type(param) not in (nn.Parameter, Tensor) or param.dim() not in (2, 3):
            continue
        if param.dtype == torch.float32 and param.is_cpu and _adds(node, param):
            assert param.grad is not None
            found[i] = cast(GradSink, _InPlace(param.grad))
    return found
