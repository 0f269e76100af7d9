"""``spu.GradScaler``: torch.amp.GradScaler whose fused parameters need no unscaling.

A backward from a loss that this class has scaled knows the scale. The first time it meets a parameter of a fused op, it
gives that parameter a sink, which from then on writes its fp32 gradient at true scale and checks it in the same pass.
All other gradients stay scaled, as with torch's class, and ``unscale_`` unscales those alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from spu.common import torch_private
from spu.common.dtypes import HALVES
from spu.ops import grad_sqnorm
from spu.ops.adopters import will_adopt
from spu.ops.sink import BackwardScope, GradSink, attach_sink, open_scope, sink_of
from spu.optim.adamw import AdamW
from spu.precision.parameter_sink import ParameterSink, unscale_grad

__all__ = ["GradScaler"]

_T = TypeVar("_T")
# Those that take one dtype alone, or keep squares in the parameter's, where fp16 makes them 0 (AdamW is an Adam).
_NOT_IN_FP16 = tuple(
    getattr(torch.optim, name) for name in ("Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta")
)
_ADOPTING = threading.Lock()  # backwards of several devices run in several threads


def _several_processes() -> bool:
    """Tell whether gradients may be sums over processes by now (DistributedDataParallel, or an all-reduce by hand)."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (param for group in optimizer.param_groups for param in group["params"])


def _as_optimizer(params: list[Tensor]) -> Any:
    """Return an object with all that torch's class reads of an optimizer to unscale its gradients."""
    return SimpleNamespace(param_groups=[{"params": params}])


def _not_in_fp16(optimizer: torch.optim.Optimizer) -> TypeError:
    return TypeError(
        f"{type(optimizer).__name__} cannot update float16 parameters from their fp32 gradients: use spu.optim.AdamW, "
        "which keeps an fp32 master of each, or keep the parameters in fp32"
    )


@contextmanager
def _tried_in_fp16(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Look at what another library's optimizer does with fp16 parameters in its first step, and undo it if need be.

    Raises:
        TypeError: it mixes dtypes that do not mix; or it divides (it has an ``eps``) by what it keeps in fp16, where
            squares of gradients below 2e-4 are 0, and 1e-8 is too.
    """
    params = [p for p in _parameters(optimizer) if p.dtype == torch.float16 and p.grad is not None]
    known = type(optimizer).__module__.startswith("torch.optim")
    if known or not params or any(optimizer.state.get(param) for param in params):
        yield
        return
    before = [param.detach().clone() for param in params]

    def undo() -> None:
        for param, value in zip(params, before, strict=True):
            param.data.copy_(value)
            optimizer.state.pop(param, None)

    try:
        yield
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        undo()
        raise _not_in_fp16(optimizer) from error
    divides = any(group.get("eps") for group in optimizer.param_groups)
    kept = [v for p in params for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor) and v.numel() > 1]
    if divides and any(value.dtype == torch.float16 for value in kept):
        undo()
        raise _not_in_fp16(optimizer)


@contextmanager
def _narrow_gradients(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Give bf16 parameters bf16 gradients inside, rounded once from the fp32 ones, which come back at the end.

    An optimizer that does not know of main gradients may mix them with state of the parameter's dtype, or hand both to
    a kernel that reads one dtype. fp16 would lose small gradients at true scale: those stay fp32, where that works.
    """
    handed: list[tuple[Tensor, Tensor, Tensor]] = []
    for param in _parameters(optimizer):
        main = param.grad
        if main is None or main.dtype != torch.float32 or param.dtype not in HALVES:
            continue
        if param.dtype == torch.bfloat16:
            handed.append((param, main, main.to(torch.bfloat16)))
        elif isinstance(optimizer, _NOT_IN_FP16) or getattr(optimizer, "defaults", {}).get("fused"):
            raise _not_in_fp16(optimizer)
    for param, _, narrow in handed:
        param.grad = None
        param.grad_dtype = torch.bfloat16
        param.grad = narrow
    try:
        with _tried_in_fp16(optimizer):
            yield
    finally:
        for param, main, narrow in handed:
            left = param.grad
            param.grad = None
            param.grad_dtype = torch.float32
            if left is not None:  # else the optimizer, or a hook of it, has cleared it
                param.grad = main if left is narrow else left.to(torch.float32)


@contextmanager
def _skipping_alone(optimizer: AdamW) -> Iterator[None]:
    """Let torch's ``step`` leave an overflow to the optimizer, inside, and nobody else who asks for that."""
    before = optimizer._step_supports_amp_scaling
    optimizer._step_supports_amp_scaling = True
    try:
        yield
    finally:
        optimizer._step_supports_amp_scaling = before


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler for models with fused layers: an existing loop changes its import and nothing else.

    Arguments, methods, state_dict and the order of calls are torch's. The differences:

    - parameters of fused ops (``spu.accelerate``, ``spu.nn``, ``spu.ops``) have fp32 gradients at true scale as soon as
      the backward is over; ``unscale_`` and ``step`` leave those as they are and skip on their overflows all the same;
    - fp16 and bf16 parameters are allowed: their gradients become fp32, for ``spu.optim.AdamW``.

    Gradients of backwards that did not start at ``scale``'s result (an earlier stage's, a loss that nobody scaled)
    count as scaled, as with torch's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()

    def _prepare(self) -> None:
        self._root: BackwardScope | None = None
        self._root_of: tuple[Tensor, int] | None = None  # the scale that it was made for, and its version
        if self._enabled:
            will_adopt(self)

    def scale(self, outputs: Any) -> Any:
        """Return outputs * scale, as torch's; backwards from the result know the scale."""
        scaled = super().scale(outputs)
        return self._in_scope(scaled) if self._enabled else scaled

    def _in_scope(self, value: _T) -> _T:
        if isinstance(value, Tensor):
            return open_scope(value, self._scope(value.device), fresh=True)  # schedules may detach a loss in place
        assert isinstance(value, Iterable)  # torch's scale has raised for everything else
        inner = map(self._in_scope, value)
        return type(value)(inner) if isinstance(value, (list, tuple)) else inner  # type: ignore[call-arg,return-value]

    def _scope(self, device: torch.device) -> BackwardScope:
        """Return this scale's scope on a device. Later scales have other scopes: a scaled loss keeps its scale."""
        present = cast(Tensor, self._scale)
        root = self._root
        if (
            root is None
            or self._root_of is None
            or self._root_of[0] is not present
            or self._root_of[1] != torch_private.version(present)
        ):
            scale = present.detach().clone().reshape(1)
            inv_scale = scale.double().reciprocal().float()
            root = self._root = BackwardScope(scale, inv_scale, torch.zeros_like(scale), adopt=self._adopt)
            self._root_of = present, torch_private.version(present)
        return root.on(device)

    def _adopt(self, param: Tensor) -> GradSink | None:
        """Give a parameter the sink that makes its gradients arrive unscaled, and unscale the gradient that it has
        already.
        """
        with _ADOPTING:
            found = sink_of(param)
            if found is not None:
                return found
            sink = ParameterSink(cast(torch.nn.Parameter, param), adopted=True)
            if param.grad is not None:
                unscale_grad(param, self._scope(param.device).inv_scale)
                sink.at_true_scale = True
            if param.dtype in HALVES:
                param.grad_dtype = torch.float32
            attach_sink(param, sink)
            param.register_hook(sink.unscale)
            return sink

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide by the scale, as torch's, those of the optimizer's gradients that are not at true scale yet."""
        super().unscale_(optimizer)
        if self._enabled:
            for param in _parameters(optimizer):
                sink = sink_of(param)
                if isinstance(sink, ParameterSink) and sink.adopted:
                    # Until the next backward: what the user leaves or puts here is scaled.
                    sink.at_true_scale = sink.seen_scaled = False

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Unscale the gradients that are still scaled; the result speaks for all of the optimizer's gradients.

        It speaks of the values that are there now, as torch's does: what a backward saw may have been zeroed, repaired,
        clipped, replaced or reduced since, and no counter tells of a write through ``.data`` or by a foreign kernel.
        """
        scaled: list[Tensor] = []
        others: list[Tensor] = []  # at true scale, but of another kind than our backward leaves
        true: dict[torch.device, list[Tensor]] = {}
        reduced = _several_processes()  # the gradient of a parameter that this process did not use comes from others
        for param in _parameters(optimizer):
            grad = param.grad
            if grad is None:
                continue
            sink = sink_of(param)
            if sink is None and param.dtype in HALVES and param.requires_grad and grad.layout == torch.strided:
                sink, grad = self._adopt(param), cast(Tensor, param.grad)
            if not isinstance(sink, ParameterSink) or not (sink.at_true_scale or (reduced and not sink.seen_scaled)):
                scaled.append(param)
            elif grad.dtype == torch.float32 and grad.layout == torch.strided:
                true.setdefault(grad.device, []).append(grad)
            else:
                others.append(param)
        found = super()._unscale_grads_(_as_optimizer(scaled), inv_scale, found_inf, allow_fp16)
        flags = [super()._unscale_grads_(_as_optimizer(others), torch.ones_like(inv_scale), found_inf, allow_fp16)]
        flags += [{device: (~grad_sqnorm(grads).isfinite()).float().squeeze(0)} for device, grads in true.items()]
        for device, flag in (pair for found_here in flags for pair in found_here.items()):
            found[device] = torch.maximum(found[device], flag) if device in found else flag
        return found

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Unscale if that has not been done, and update unless a gradient is not finite, as torch's.

        With an optimizer that skips on its own (``spu.optim.AdamW``, torch's with ``fused=True``) nothing waits for
        the device. Other optimizers than ``spu.optim.AdamW`` find bf16 gradients in bf16 parameters, as in plain torch.

        Raises:
            TypeError: fp16 parameters and an optimizer that cannot update them.
        """
        # Not left to an optimizer that unscales by itself: it cannot know which gradients are unscaled already.
        ready = self._enabled and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY
        if ready and "closure" not in kwargs:
            self.unscale_(optimizer)
        if isinstance(optimizer, AdamW):
            with _skipping_alone(optimizer):
                return super().step(optimizer, *args, **kwargs)
        with _narrow_gradients(optimizer):
            return super().step(optimizer, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {key: value for key, value in state.items() if key not in ("_root", "_root_of")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()
