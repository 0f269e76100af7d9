"""fp32 main gradients: after backward every ``p.grad`` is fp32, at true scale, summed, and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spu.common.dtypes import STORAGE
from spu.ops.sink import attach_sink, detach_sink, sink_of
from spu.precision.parameter_sink import ParameterSink

__all__ = ["MainGrads"]


class MainGrads:
    """Keeps the gradient contract for a set of parameters.

    Call ``begin_step()`` before the first backward of every step. After the backwards, each parameter that was used has
    ``p.grad``: fp32, at true scale, summed over all of them; the others have None. Every value has been seen by the
    scope's found_inf. Backwards outside a scope add plain gradients (in fp32, unchecked).

    The tensor in ``p.grad`` may be written again after the next ``begin_step()``: clone it to keep it.

    Args:
        params: fp16, bf16 or fp32 leaf parameters; duplicates count once; those without requires_grad are skipped.
        hooked: unscale what autograd adds by itself; False where no backward has a loss scale, gradients are dense and
            no memory is lent, so that gradients of fp32 parameters are right as they are.

    Raises:
        TypeError: for a parameter of another dtype.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, hooked: bool = True) -> None:
        self._hooked = hooked
        self._params: list[nn.Parameter] = []
        for param in dict.fromkeys(params):
            if not param.requires_grad:
                continue
            if param.dtype not in STORAGE:
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
        """Empty every ``p.grad`` (buffers are kept for reuse) and make sure that hooks and sinks are attached.

        ``grad_dtype`` is set again each time: load_state_dict(assign=True), ``to("meta")`` and others lose it.
        """
        if not self._sinks:
            self._sinks = [ParameterSink(param) for param in self._params]
            for param, sink in zip(self._params, self._sinks, strict=True):
                if not self._hooked and param.dtype == torch.float32:
                    continue
                trained = param.requires_grad
                param.requires_grad_(True)  # torch takes no hook for a frozen one, but keeps it for when it is not
                self._hooks.append(param.register_hook(sink.unscale))
                param.requires_grad_(trained)
        for param, sink in zip(self._params, self._sinks, strict=True):
            if sink_of(param) is not sink:
                attach_sink(param, sink)
            sink.begin_step(param, hooked=self._hooked)

    def lend(self, buffers: Mapping[int, Tensor]) -> None:
        """Let the gradients to come be written into these tensors, by parameter id; into new ones where there is none.

        A gradient that autograd makes by itself may still lie elsewhere.

        Args:
            buffers: fp32, contiguous, of the parameters' shapes; their values do not matter.
        """
        for param, sink in zip(self._params, self._sinks, strict=False):
            sink.lend(buffers.get(id(param)))

    def require_scope(self, required: bool) -> None:
        """Raise for gradients from a backward outside a scope, if required; by default they are added as they are."""
        for sink in self._sinks:
            sink.needs_scope = required

    def close(self) -> None:
        """Remove hooks and sinks and free kept buffers; gradients stay as they are."""
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
