"""fp32 main gradients: after backward every ``p.grad`` is fp32, at true scale, summed, and checked.

Parameters of fused ops get theirs from a sink that accumulates straight into the buffer; all others through a leaf hook
that unscales into fp32 before torch accumulates. A parameter with both kinds of uses gets the sum in one buffer,
whichever came first. A buffer is never zeroed: the first contribution of a step is a store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import TensorWeakRef

from ..ops import linear_db_, linear_dw_, linear_dw_db_, unscale_
from ..ops.sink import BackwardScope, GradSink, accumulates, adopting, attach_sink, current_scope, detach_sink, sink_of


def _is_main_grad(grad: Tensor | None, param: Tensor) -> bool:
    """Whether a fused op can write into this tensor."""
    return (
        grad is not None
        and grad.dtype == torch.float32
        and grad.layout == torch.strided
        and grad.is_contiguous()
        and grad.shape == param.shape
        and grad.device == param.device
    )


def _stamp(grad: Tensor) -> tuple[int, int]:
    """Changes when someone replaces a gradient or writes to it; our own ops leave it."""
    return grad.data_ptr(), grad._version


def _now_or_later(accumulate: Callable[[BackwardScope], None]) -> None:
    """Does a sink's work, or leaves it to whoever defers the weight gradients of this backward."""
    scope = current_scope()
    assert scope is not None
    if scope.deferred is not None:
        scope.deferred.append(partial(accumulate, scope))
    else:
        accumulate(scope)


class ParameterSink:
    """Accumulates one parameter's gradients into its ``grad``, whose memory it hands from step to step.

    Args:
        param: held weakly.
        adopted: by a GradScaler; the sink then has a found_inf of its own, on the parameter's device, instead of its
            scopes'.
    """

    def __init__(self, param: nn.Parameter, adopted: bool = False) -> None:
        self._param = TensorWeakRef(param)  # sinks are found through the parameter: a strong link would keep both alive
        self.needs_scope = False
        self.found_inf = torch.zeros(1, dtype=torch.float32, device=param.device) if adopted else None
        self.seen = False  # whether it may be set
        self._written: tuple[int, int] | None = None  # the gradient as the last fused op left it, if that came last
        self._buffer: Tensor | None = None  # the last step's gradient, until this step's first contribution takes it

    def linear_weight(self, dz: Tensor, x: Tensor, backend: str) -> None:
        _now_or_later(partial(self._accumulate, linear_dw_, (dz, x), backend))

    def linear_bias(self, dz: Tensor, backend: str) -> None:
        _now_or_later(partial(self._accumulate, linear_db_, (dz,), backend))

    def linear_weight_and_bias(self, dz: Tensor, x: Tensor, bias_sink: GradSink, backend: str) -> None:
        """``linear_weight`` here and ``linear_bias`` there, in one op unless only one of them adds to something."""
        if isinstance(bias_sink, ParameterSink) and self.found_inf is None and bias_sink.found_inf is None:
            _now_or_later(partial(self._accumulate_both, bias_sink, dz, x, backend))
        else:
            self.linear_weight(dz, x, backend)
            bias_sink.linear_bias(dz, backend)

    def _accumulate(self, op: Any, operands: tuple[Tensor, ...], backend: str, scope: BackwardScope) -> None:
        grad, accumulate = self._target()
        if self.found_inf is not None:
            scope = scope.on(grad.device)
        op(*operands, grad, scope.inv_scale, self._flag(scope, accumulate), accumulate=accumulate, backend=backend)
        self._keep(grad)

    def _accumulate_both(self, bias: ParameterSink, dz: Tensor, x: Tensor, backend: str, scope: BackwardScope) -> None:
        if (self._parameter().grad is None) != (bias._parameter().grad is None):
            self._accumulate(linear_dw_, (dz, x), backend, scope)
            bias._accumulate(linear_db_, (dz,), backend, scope)
            return
        (weight_grad, adds), (bias_grad, _) = self._target(), bias._target()
        flags = scope.inv_scale, scope.found_inf
        linear_dw_db_(dz, x, weight_grad, bias_grad, *flags, accumulate=adds, backend=backend)
        self._keep(weight_grad)
        bias._keep(bias_grad)

    def _target(self) -> tuple[Tensor, bool]:
        """(where the next contribution goes, whether it is added to what is there)."""
        param = self._parameter()
        grad = param.grad
        if grad is not None and not _is_main_grad(grad, param):
            # Someone else's gradient (of another layout): replace it by a main gradient of the same value.
            grad = param.grad = grad.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return (self._take_buffer(param), False) if grad is None else (grad, True)

    def _keep(self, grad: Tensor) -> None:
        param = self._parameter()
        if param.grad is not grad:
            param.grad = grad
        if self.found_inf is not None:
            self._written = _stamp(grad)

    def is_checked(self, grad: Tensor) -> bool:
        """Whether the own flag speaks of this gradient: not of one that was changed after the backward."""
        return self.found_inf is not None and (self._written is None or self._written == _stamp(grad))

    def _parameter(self) -> Tensor:
        param = self._param()
        assert param is not None
        return param

    def _take_buffer(self, param: Tensor) -> Tensor:
        buffer, self._buffer = self._buffer, None
        if buffer is None or not _is_main_grad(buffer, param):
            return torch.empty(param.shape, dtype=torch.float32, device=param.device)
        return buffer

    def _flag(self, scope: BackwardScope, accumulate: bool) -> Tensor:
        """Where this contribution reports a non-finite value; the own flag speaks of the gradient that is there now."""
        if self.found_inf is None:
            return scope.found_inf
        if self.seen and not accumulate:
            self.found_inf.zero_()
        self.seen = True
        return self.found_inf

    def begin_step(self) -> None:
        param = self._parameter()
        if param.grad is not None:
            self._buffer = param.grad
        param.grad = None
        param.grad_dtype = torch.float32

    def unscale(self, grad: Tensor | None) -> Tensor | None:
        """Leaf hook: inside a scope, the gradient unscaled to fp32 and checked; outside, the gradient as it is."""
        scope, param = current_scope(), self._param()
        if grad is None or param is None:  # None: all uses were fused and went to the sink
            return grad
        if sink_of(param) is not self:  # replaced by another MainGrads, whose hook unscales
            return grad
        if scope is None:
            if self.needs_scope or (self.found_inf is not None and adopting()):
                raise RuntimeError(
                    "a gradient came from a backward inside the backward, which does not know the loss scale: use "
                    "torch.utils.checkpoint with use_reentrant=False, or the trainer's recompute=True"
                )
            return grad
        if not accumulates(get_gradient_edge(param).node):  # torch.autograd.grad returns it, as it is
            return grad
        if grad.layout != torch.strided:
            raise TypeError(
                f"MainGrads: a gradient of layout {grad.layout} cannot be unscaled: build the layer with dense "
                "gradients (nn.Embedding(..., sparse=False))"
            )
        if scope.plain and grad.dtype == torch.float32:
            self._buffer = None  # autograd moves the first gradient into place
            return grad
        # Autograd adds what is returned to param.grad, or moves it there if there is none yet.
        first = param.grad is None
        self._written = None
        if self.found_inf is not None:
            scope = scope.on(param.device)
        value = self._take_buffer(param) if first else torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
        unscale_(grad, value, scope.inv_scale, self._flag(scope, accumulate=not first), accumulate=False)
        return value


class MainGrads:
    """Keeps the gradient contract for a set of parameters.

    Call ``begin_step()`` before the first backward of every step. After the backwards, each parameter that was used has
    ``p.grad``: fp32, at true scale, summed over all of them; the others have None. Every value has been seen by the
    scope's found_inf. Backwards outside a scope add plain gradients (in fp32, unchecked).

    The tensor in ``p.grad`` may be written again after the next ``begin_step()``: clone it to keep it.

    Args:
        params: fp16, bf16 or fp32 leaf parameters; duplicates count once; those without requires_grad are skipped.

    Raises:
        TypeError: for a parameter of another dtype.
    """

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self._params: list[nn.Parameter] = []
        for param in dict.fromkeys(params):
            if not param.requires_grad:
                continue
            if param.dtype not in (torch.float16, torch.bfloat16, torch.float32):
                raise TypeError(
                    f"MainGrads: a parameter of shape {tuple(param.shape)} is {param.dtype}: fp32 main gradients serve "
                    "float16, bfloat16 and float32"
                )
            self._params.append(param)
        self._sinks: list[ParameterSink] = []
        self._hooks: list[Any] = []

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters served, each once."""
        return list(self._params)

    def begin_step(self) -> None:
        """Empties every ``p.grad`` (buffers are kept for reuse) and makes sure that the contract's machinery is there.

        ``grad_dtype`` is set again each time: load_state_dict(assign=True), ``to("meta")`` and others lose it.
        """
        if not self._sinks:
            for param in self._params:
                self._sinks.append(ParameterSink(param))
                self._hooks.append(param.register_hook(self._sinks[-1].unscale))
        for param, sink in zip(self._params, self._sinks, strict=True):
            if sink_of(param) is not sink:
                attach_sink(param, sink)
            sink.begin_step()

    def require_scope(self, required: bool) -> None:
        """While required, a gradient from a backward outside a scope raises; by default it is added as it is."""
        for sink in self._sinks:
            sink.needs_scope = required

    def close(self) -> None:
        """Removes hooks and sinks and frees kept buffers; gradients stay as they are."""
        for hook in self._hooks:
            hook.remove()
        for param, sink in zip(self._params, self._sinks, strict=False):
            if sink_of(param) is sink:
                detach_sink(param)
        self._sinks, self._hooks = [], []

    def __enter__(self) -> MainGrads:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
