"""How one parameter's gradients become its fp32 main gradient.

Fused ops hand their operands to the parameter's sink, which accumulates straight into the buffer; all other gradients
pass a leaf hook that unscales into fp32 before torch accumulates. A parameter with both kinds of uses gets the sum in
one buffer, whichever came first. A buffer is never zeroed: the first contribution of a step is a store.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import TensorWeakRef

from spu.common.dtypes import HALVES
from spu.common.torch_private import post_accumulate_hooks
from spu.ops import embedding_dw_, has_kernel, linear_db_, linear_dw_, linear_dw_db_, unscale_
from spu.ops.experts import experts_dw_
from spu.ops.linear import linear_dw_each_
from spu.ops.sink import (
    BackwardScope,
    GradSink,
    MainGrad,
    accumulates,
    adopting,
    current_scope,
    graph_task_id,
    has_foreign_hook,
    may_be_main_grad,
)

__all__ = ["ParameterSink", "check_dense", "unscale_grad"]


def _now_or_later(param: Tensor, accumulate: Callable[..., None], *arguments: Any) -> None:
    """Do a sink's work, ``accumulate(param, scope, *arguments)``, or leave it to whoever defers this backward's.

    At once where a post-accumulate hook is to see the gradient: autograd runs it at the end of this backward.
    """
    scope = current_scope()
    assert scope is not None
    if scope.deferred is not None and not post_accumulate_hooks(param):
        scope.deferred.append(partial(accumulate, param, scope, *arguments))
    else:
        accumulate(param, scope, *arguments)


class ParameterSink:
    """Accumulates one parameter's gradients into its ``grad``, whose memory it hands from step to step.

    Args:
        param: held weakly.
        adopted: by a GradScaler, whose users may put gradients of their own into ``param.grad``, scaled as torch's.

    Attributes:
        lent: the gradient gets memory of somebody else's.
    """

    def __init__(self, param: nn.Parameter, adopted: bool = False) -> None:
        self._param = TensorWeakRef(param)  # sinks are found through the parameter: a strong link would keep both alive
        self.adopted, self.attached = adopted, False
        self.needs_scope = False
        self.at_true_scale = not adopted  # what ``param.grad`` holds; adopted: from a backward to the next unscale_
        self.seen_scaled = False  # adopted: a backward outside a scope had a gradient for it since the last unscale_
        self._inv_scale: Tensor | None = None  # adopted: of the last scope that brought ``param.grad`` to true scale
        self._buffer: Tensor | None = None  # the last step's gradient, or lent; this step's first contribution takes it
        self.lent = False
        self._took = False  # an op has asked for memory in this step
        self._lock = threading.Lock()  # backwards in several threads may meet here

    def linear_weight(self, dz: Tensor, x: Tensor, backend: str) -> None:
        _now_or_later(self._parameter(), self._accumulate, linear_dw_, (dz, x), backend)

    def linear_weights(self, others: Sequence[GradSink], dzs: Sequence[Tensor], x: Tensor, backend: str) -> None:
        """Do ``linear_weight`` in several sinks, in one op where no hook is to see one of the gradients at once."""
        sinks = [self, *(sink for sink in others if isinstance(sink, ParameterSink))]
        if len(set(map(id, sinks))) <= len(others) or any(post_accumulate_hooks(s._parameter()) for s in sinks):
            GradSink.linear_weights(self, others, dzs, x, backend)  # one is not of this class, or twice there
        else:
            _now_or_later(self._parameter(), self._accumulate_each, sinks, dzs, x, backend)

    def experts_weight(self, dzs: Sequence[Tensor], x: Tensor, ends: Tensor, backend: str) -> None:
        _now_or_later(self._parameter(), self._accumulate, experts_dw_, (dzs, x, ends), backend)

    def linear_bias(self, dz: Tensor, backend: str) -> None:
        _now_or_later(self._parameter(), self._accumulate, linear_db_, (dz,), backend)

    def embedding_weight(self, dy: Tensor, ids: Tensor, padding_idx: int, backend: str) -> None:
        _now_or_later(self._parameter(), self._accumulate, embedding_dw_, (dy, ids, padding_idx), backend)

    def summed(self, grad: Tensor, backend: str) -> None:
        _now_or_later(self._parameter(), self._accumulate, unscale_, (grad,), backend)

    def linear_weight_and_bias(self, dz: Tensor, x: Tensor, bias_sink: GradSink, backend: str) -> None:
        """Do ``linear_weight`` here and ``linear_bias`` in the bias's sink, in one op where the backend has a kernel
        for both.
        """
        if (
            isinstance(bias_sink, ParameterSink)
            and has_kernel("linear_dw_db_", backend)
            and not post_accumulate_hooks(bias_sink._parameter())
        ):
            _now_or_later(self._parameter(), self._accumulate_both, bias_sink, dz, x, backend)
        else:
            self.linear_weight(dz, x, backend)
            bias_sink.linear_bias(dz, backend)

    def _accumulate(
        self, param: Tensor, scope: BackwardScope, op: Callable[..., None], operands: tuple[Any, ...], backend: str
    ) -> None:
        with self._lock:
            into = self._target(param, self._settle(param, scope))
            op(*operands, into, backend=backend)
            self._keep(param, into)

    def _accumulate_each(
        self,
        param: Tensor,
        scope: BackwardScope,
        sinks: Sequence[ParameterSink],
        dzs: Sequence[Tensor],
        x: Tensor,
        backend: str,
    ) -> None:
        with ExitStack() as locks:
            for sink in sorted(sinks, key=id):  # in one order, whoever asks
                locks.enter_context(sink._lock)
            params = [sink._parameter() for sink in sinks]
            into = [sink._target(p, sink._settle(p, scope)) for sink, p in zip(sinks, params, strict=True)]
            if len({target.accumulate for target in into}) == 1:
                linear_dw_each_(dzs, x, [target.main_grad for target in into], into[0], backend=backend)
            else:
                for dz, target in zip(dzs, into, strict=True):
                    linear_dw_(dz, x, target, backend=backend)
            for sink, p, target in zip(sinks, params, into, strict=True):
                sink._keep(p, target)

    def _accumulate_both(
        self, param: Tensor, scope: BackwardScope, bias: ParameterSink, dz: Tensor, x: Tensor, backend: str
    ) -> None:
        bias_param = bias._parameter()
        with self._lock, bias._lock:
            into = self._target(param, self._settle(param, scope))
            bias_into = bias._target(bias_param, bias._settle(bias_param, scope))
            if into.accumulate == bias_into.accumulate:
                linear_dw_db_(dz, x, into, bias_into.main_grad, backend=backend)
            else:
                linear_dw_(dz, x, into, backend=backend)
                linear_db_(dz, bias_into, backend=backend)
            self._keep(param, into)
            bias._keep(bias_param, bias_into)

    def _settle(self, param: Tensor, scope: BackwardScope) -> BackwardScope:
        """Make ``grad`` a tensor that can be added to; return the scope on the parameter's device."""
        if self.adopted:
            scope = scope.on(param.device)
            self._inv_scale = scope.inv_scale
        grad = param.grad
        if grad is not None and not self.at_true_scale:
            unscale_grad(param, scope.scale.double().reciprocal().float())  # inv_scale may hold an op's own factor
        elif grad is not None and (grad.dtype != torch.float32 or grad.layout != torch.strided):
            with torch.no_grad():
                param.grad = grad.to_dense().to(torch.float32)
        self.at_true_scale = True
        return scope

    def _target(self, param: Tensor, scope: BackwardScope) -> MainGrad:
        """Return where an op writes the next contribution."""
        grad = param.grad
        if grad is None or not grad.is_contiguous():
            return MainGrad(self._take_buffer(param), scope.inv_scale, scope.found_inf, False)
        return MainGrad(grad, scope.inv_scale, scope.found_inf, True)

    def _keep(self, param: Tensor, written: MainGrad) -> None:
        """Make what an op has written the parameter's gradient; what was added to it is there already."""
        if written.accumulate:
            return
        if param.grad is not None:  # laid out in another way by the user, to whom it belongs, or below: it stays
            with torch.no_grad():
                param.grad.add_(written.main_grad)
        elif self.adopted and not param.is_contiguous():  # in the parameter's strides, as autograd's: fused optimizers
            with torch.no_grad():
                param.grad = torch.empty_like(param, dtype=torch.float32).copy_(written.main_grad)
        else:
            param.grad = written.main_grad

    def _parameter(self) -> Tensor:
        param = self._param()
        assert param is not None
        return param

    def _take_buffer(self, param: Tensor) -> Tensor:
        if param.grad_dtype != torch.float32:  # lost by module.half()
            param.grad_dtype = torch.float32
        buffer, self._buffer, self._took = self._buffer, None, True
        if buffer is None or not may_be_main_grad(buffer, param):
            return torch.empty(param.shape, dtype=torch.float32, device=param.device)
        return buffer

    def lend(self, buffer: Tensor | None) -> None:
        self._buffer, self.lent = buffer, buffer is not None

    @torch.no_grad()
    def _placed(self, grad: Tensor) -> Tensor:
        """Return a gradient, which autograd takes as it is, in the memory that was lent: it would be there twice."""
        buffer, param = self._buffer, self._parameter()
        if buffer is not None and param.grad is None and accumulates(get_gradient_edge(param).node):
            self._buffer, grad = None, buffer.copy_(grad)
        return grad

    def begin_step(self, param: Tensor, *, hooked: bool) -> None:
        # Without a hook nothing would let go of it where autograd makes the gradient, as in the last step.
        if param.grad is not None and (hooked or self._took):
            self._buffer = param.grad
        self._took = False
        param.grad = None
        param.grad_dtype = torch.float32

    def unscale(self, grad: Tensor | None) -> Tensor | None:
        """Tensor hook: return the gradient unscaled to fp32 and checked inside a scope, the gradient itself outside."""
        if grad is None or not self.attached:  # all uses were fused; or another MainGrads' hook unscales
            return grad
        scope = current_scope()
        if scope is not None and scope.plain and grad.dtype == torch.float32 and grad.layout == torch.strided:
            if self.lent:
                return self._placed(grad)
            self._buffer = None  # autograd moves the first gradient into place
            return grad
        param = self._parameter()
        node = get_gradient_edge(param).node
        if not accumulates(node):  # torch.autograd.grad returns it, as it is
            if self.adopted and scope is not None:
                self._scale_back(param, scope)
            return self._outside(grad, returned=True) if scope is None and self.adopted else grad
        if scope is None:
            if self.needs_scope or (self.adopted and adopting()):
                raise RuntimeError(
                    "a gradient came from a backward inside the backward, which does not know the loss scale: use "
                    "torch.utils.checkpoint with use_reentrant=False, or the trainer's recompute=True"
                )
            return self._outside(grad, returned=False) if self.adopted else grad
        if not has_foreign_hook(param):
            return self._in_dtype(grad, self._unscaled(grad, scope))
        # Others see the scaled gradient, also if their hooks come after this one: a node's run after all of a tensor's.
        task = graph_task_id()

        def unscale_at_last(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if graph_task_id() != task:
                return grads
            handle.remove()
            return (self._in_dtype(grads[0], self._unscaled(grads[0], scope)),)

        handle = node.register_prehook(unscale_at_last)
        return grad

    @torch.no_grad()
    def _in_dtype(self, grad: Tensor, value: Tensor) -> Tensor:
        """Return what a hook may put in the place of a gradient, whose fp32 value is another tensor.

        autograd lets no hook change a dtype, and has converted a gradient to ``grad_dtype`` only if that was set when
        the backward began. A parameter that a fused op has adopted since, beside a use that is not fused, gets
        the value here, and autograd adds 0 to it.
        """
        if value.dtype == grad.dtype:
            return value
        with self._lock:
            param = self._parameter()
            if param.grad is None:
                param.grad = value
            else:
                param.grad.add_(value)
        return torch.zeros_like(grad)

    @torch.no_grad()
    def _outside(self, grad: Tensor, returned: bool) -> Tensor:
        """Return what a backward that a GradScaler does not know of adds: an earlier stage's, begun at a gradient.

        torch's class divides whatever is in ``grad``. So the first such gradient stays as it is, until ``unscale_``;
        to one that is at true scale already it is added divided. One that is returned, and put into ``grad`` by hand
        (by the zero-bubble schedules of torch.distributed.pipelining), has to have the dtype that ``grad`` has.
        """
        with self._lock:
            self.seen_scaled = True
            if self._parameter().grad is None:
                self.at_true_scale = False
            if returned:
                return grad.to(torch.float32) if grad.dtype in HALVES else grad
            if self.at_true_scale and self._inv_scale is not None:
                return grad.to(torch.float32) * self._inv_scale.squeeze(0)
            return grad

    @torch.no_grad()
    def _scale_back(self, param: Tensor, scope: BackwardScope) -> None:
        """Multiply what ``grad`` has by the scale again, before ``torch.autograd.grad`` returns a scaled gradient.

        Its caller may put that into ``grad``, or add it there: then all of it is scaled, as with torch's class.
        """
        with self._lock:
            if self.at_true_scale and param.grad is not None:
                param.grad.mul_(scope.on(param.device).scale.squeeze(0))
            self.at_true_scale = False

    def _unscaled(self, grad: Tensor, scope: BackwardScope) -> Tensor:
        if not self.adopted:
            check_dense(grad)
        # Autograd adds what is returned to param.grad, or moves it there if there is none yet.
        with self._lock:
            param = self._parameter()
            scope = self._settle(param, scope)
            if grad.layout != torch.strided:
                return grad * scope.inv_scale.squeeze(0)  # a hook has to leave the layout
            value = self._take_buffer(param) if param.grad is None else grad.new_empty(grad.shape, dtype=torch.float32)
        unscale_(grad, MainGrad(value, scope.inv_scale, scope.found_inf, False))
        return value


@torch.no_grad()
def unscale_grad(param: Tensor, inv_scale: Tensor) -> None:
    """Bring a scaled ``param.grad`` to true scale in fp32. An fp32 gradient is changed in place: it may be a view of a
    buffer of the user's.
    """
    grad = param.grad
    assert grad is not None
    if grad.dtype == torch.float32 and grad.layout == torch.strided:
        grad.mul_(inv_scale.squeeze(0))
        return
    param.grad = None
    param.grad_dtype = torch.float32
    param.grad = grad.to_dense().to(torch.float32) * inv_scale.squeeze(0)


def check_dense(grad: Tensor) -> None:
    """Raise TypeError for a gradient that is sparse: a main gradient has one value for each of its parameter's."""
    if grad.layout != torch.strided:
        raise TypeError(
            f"MainGrads: a gradient of layout {grad.layout} is no main gradient: build the layer with dense gradients "
            "(nn.Embedding(..., sparse=False))"
        )
