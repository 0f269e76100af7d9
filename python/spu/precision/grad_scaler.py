"""``spu.GradScaler``: torch.amp.GradScaler whose fused parameters need no unscaling.

A backward from a loss that this class has scaled knows the scale. The first time it meets a parameter of a fused op, it
gives that parameter a sink, which from then on writes its fp32 gradient at true scale and checks it in the same pass.
All other gradients stay scaled, as with torch's class, and ``unscale_`` unscales those alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, TypeVar, cast
from weakref import WeakSet

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from ..ops import unscale_
from ..ops.sink import BackwardScope, GradSink, attach_sink, open_scope, sink_of
from .main_grads import ParameterSink

_T = TypeVar("_T")
_HALVES = (torch.float16, torch.bfloat16)


def _several_processes() -> bool:
    """Whether gradients may be sums over processes by now (DistributedDataParallel, or an all-reduce by hand)."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler for models with fused layers: an existing loop changes its import and nothing else.

    Arguments, methods, state_dict and the order of calls are torch's. What differs:

    - parameters of fused ops (``spu.accelerate``, ``spu.nn``, ``spu.ops``) have fp32 gradients at true scale as soon as
      the backward is over; ``unscale_`` and ``step`` leave those as they are and skip on their overflows all the same;
    - fp16 and bf16 parameters are allowed: their gradients become fp32, for ``spu.optim.AdamW``;
    - gradients of a backward that did not start at ``scale``'s result are taken to be at true scale for parameters of
      fused ops.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()

    def _prepare(self) -> None:
        self._lock = threading.Lock()  # backwards of several devices run in several threads
        self._root: BackwardScope | None = None  # of the present scale
        self._sinks: WeakSet[ParameterSink] = WeakSet()

    def scale(self, outputs: Any) -> Any:
        """outputs * scale, as torch's; backwards from the result know the scale."""
        scaled = super().scale(outputs)
        return self._in_scope(scaled) if self._enabled else scaled

    def _in_scope(self, value: _T) -> _T:
        if isinstance(value, Tensor):
            return open_scope(value, self._scope(value.device))
        assert isinstance(value, Iterable)  # torch's scale has raised for everything else
        inner = map(self._in_scope, value)
        return type(value)(inner) if isinstance(value, (list, tuple)) else inner  # type: ignore[call-arg,return-value]

    def _scope(self, device: torch.device) -> BackwardScope:
        """This scale's scope on a device. Later scales have scopes of their own: a scaled loss keeps its scale."""
        if self._root is None:
            scale = cast(Tensor, self._scale).detach().clone().reshape(1)
            inv_scale = scale.double().reciprocal().float()
            self._root = BackwardScope(scale, inv_scale, torch.zeros_like(scale), adopt=self._adopt)
        return self._root.on(device)

    def _adopt(self, param: Tensor) -> GradSink | None:
        """Gives a parameter the sink that makes its gradients arrive unscaled, and unscales what it has already."""
        with self._lock:
            found = sink_of(param)
            if found is not None:
                return found
            sink = ParameterSink(cast(torch.nn.Parameter, param), self._adopt)
            assert sink.found_inf is not None
            self._sinks.add(sink)
            grad = param.grad
            if grad is not None:
                param.grad = None
            if param.dtype in _HALVES:
                param.grad_dtype = torch.float32
            if grad is not None:
                value = torch.empty(param.shape, dtype=torch.float32, device=param.device)
                inv_scale = self._scope(param.device).inv_scale
                unscale_(grad, value, inv_scale, sink.found_inf, accumulate=False)
                param.grad, sink.seen = value, True
            attach_sink(param, sink)
            param.register_hook(sink.unscale)
            return sink

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Unscales what is still scaled; the result speaks for all of the optimizer's gradients.

        A gradient that other processes have had a part in since its backward, or that was changed by hand, is looked at
        again: what the backward saw says nothing about it.
        """
        scaled: list[Tensor] = []
        unchecked: list[Tensor] = []
        reduced = _several_processes()
        flags: dict[torch.device, dict[int, Tensor]] = {}
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            if param.grad is None:
                continue
            sink = sink_of(param)
            if sink is None and param.dtype in _HALVES and param.grad.layout == torch.strided:
                sink = self._adopt(param)
            if not isinstance(sink, ParameterSink):
                scaled.append(param)
                continue
            self._sinks.add(sink)
            if reduced or (sink.found_inf is not None and not sink.is_checked(param.grad)):
                unchecked.append(param)
                continue
            flag = self._scope(param.device).found_inf if sink.found_inf is None else sink.found_inf
            flags.setdefault(param.device, {})[id(flag)] = flag
        rest = SimpleNamespace(param_groups=[{"params": scaled}])
        found = super()._unscale_grads_(cast(Any, rest), inv_scale, found_inf, allow_fp16)
        if unchecked:
            rest = SimpleNamespace(param_groups=[{"params": unchecked}])
            again = super()._unscale_grads_(cast(Any, rest), torch.ones_like(inv_scale), found_inf, allow_fp16)
            for device, flag in again.items():
                flags.setdefault(device, {})[id(flag)] = flag.reshape(1)
        for device, own in flags.items():
            flag = torch.cat(list(own.values())).amax()
            found[device] = torch.maximum(found[device], flag) if device in found else flag
        return found

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """torch's: unscales if that has not been done, and updates unless a gradient is not finite.

        With an optimizer that skips on its own (``spu.optim.AdamW``, torch's with ``fused=True``) nothing waits for
        the device.
        """
        # Not left to an optimizer that unscales by itself: it cannot know which gradients are unscaled already.
        ready = self._enabled and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY
        if ready and "closure" not in kwargs:
            self.unscale_(optimizer)
        return super().step(optimizer, *args, **kwargs)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """torch's: backs off after a step with a non-finite gradient, grows after ``growth_interval`` good ones."""
        super().update(new_scale)
        self._root = None
        sinks = [sink for sink in self._sinks if sink.seen]
        flags = [sink.found_inf for sink in sinks if sink.found_inf is not None]
        if flags:
            torch._foreach_zero_(flags)
        for sink in sinks:
            sink.seen = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state of this class or of torch.amp.GradScaler."""
        super().load_state_dict(state_dict)
        self._root = None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {key: value for key, value in state.items() if key not in ("_lock", "_root", "_sinks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()
