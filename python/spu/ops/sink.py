"""The loss scale's way to an op's backward, and the sink of the weight gradient there.

A *scope* (scale, inv_scale, found_inf) belongs to one run of the autograd engine: an identity node near the loss
registers it under the engine's graph-task id as soon as its backward runs, and a callback that the engine holds until
the end, or drops when the backward fails, removes it. So concurrent backwards each see their own scope, and a backward
that was started any other way sees none.

A backward that is started inside another one (``out.backward(g)`` in a hook, a checkpoint with use_reentrant=True) is a
task of its own and does not inherit: open the scope again on its root, and checkpoint with use_reentrant=False.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from spu.common.tensor_table import TensorTable
from spu.common.torch_private import at_end_of_backward, backward_hooks, graph_task_id, will_execute
from spu.ops import wide_sums

__all__ = [
    "BackwardScope",
    "GradSink",
    "MainGrad",
    "accumulates",
    "adopting",
    "at_once",
    "attach_sink",
    "current_scope",
    "detach_sink",
    "has_foreign_hook",
    "leave_to_norm",
    "may_be_main_grad",
    "open_scope",
    "place_of",
    "scoped",
    "sink_of",
    "sinks_of",
]

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class BackwardScope:
    """The loss scale of one backward: fp32 tensors of one element, all on one device.

    Attributes:
        scale: the factor the loss was multiplied by.
        inv_scale: 1 / scale; inside ``at_once(factor)`` times that factor.
        found_inf: set to 1 by every op that meets a non-finite gradient; never reset by ops.
        deferred: where sinks leave their work for later, in order; None if they are to do it at once.
        whole: the backward was asked for no results or inputs: it adds to every parameter's ``grad`` that it reaches.
        plain: the scale is 1, and whoever ends the step looks for non-finite values in the sums: an fp32 gradient may
            be added as it is, without a pass over it.
        adopt: called with a parameter of a fused op that has no sink yet; may give it one.
        family: scopes of one backward must share it: they carry the same scale.
    """

    scale: Tensor
    inv_scale: Tensor
    found_inf: Tensor
    deferred: list[Callable[[], None]] | None = None
    whole: bool = False
    plain: bool = False
    adopt: Callable[[Tensor], GradSink | None] | None = None
    family: object = field(default_factory=object)
    _elsewhere: dict[torch.device, BackwardScope] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name in ("scale", "inv_scale", "found_inf"):
            value = getattr(self, name)
            if value.dtype != torch.float32 or value.shape != (1,) or value.device != self.scale.device:
                raise ValueError(
                    f"BackwardScope.{name} must be float32 of shape (1,) on {self.scale.device}, got {value.dtype} "
                    f"{tuple(value.shape)} on {value.device}"
                )
        wide_sums.install(_makes_main_grads)

    def on(self, device: torch.device) -> BackwardScope:
        """Return the same scale on another device, with a found_inf of its own there; itself on its own device."""
        if device == self.scale.device:
            return self
        found = self._elsewhere.get(device)
        if found is None:
            scale = self.scale.to(device)
            made = replace(self, scale=scale, inv_scale=self.inv_scale.to(device), found_inf=torch.zeros_like(scale))
            found = self._elsewhere.setdefault(device, made)  # one thread wins
        return found


class _Own(threading.local):
    """The thread's own form of a backward's scope, and the backward's task, which other threads may run too."""

    scope: tuple[int, BackwardScope] | None = None


_SCOPES: dict[int, BackwardScope] = {}  # of the backwards that run now
_OWN = _Own()


def current_scope() -> BackwardScope | None:
    """Return the scope of the backward that is running on this thread; None outside one, or without a scope."""
    task, own = graph_task_id(), _OWN.scope
    return own[1] if own is not None and own[0] == task else _SCOPES.get(task)


def _makes_main_grads() -> bool:
    """Tell whether a backward runs on this thread that knows a loss scale, or may reach a parameter with a sink."""
    task = graph_task_id()
    return task != -1 and (task in _SCOPES or len(_SINKS) > 0)


def adopting() -> bool:
    """Tell whether a backward runs now, on any thread, in a scope that adopts parameters: a GradScaler's."""
    return any(scope.adopt is not None for scope in list(_SCOPES.values()))


class _End:
    """Removes a backward's scope: called at its end; a backward that fails lets go of its callbacks uncalled."""

    __slots__ = ("_task",)

    def __init__(self, task: int) -> None:
        self._task = task

    def __call__(self) -> None:
        _SCOPES.pop(self._task, None)

    __del__ = __call__


def _register(scope: BackwardScope) -> None:
    task = graph_task_id()
    found = _SCOPES.get(task)
    if found is None:
        _SCOPES[task] = scope
        at_end_of_backward(_End(task))
    elif found.family is not scope.family:
        raise RuntimeError(
            "one backward from losses with two loss scales: parameters that both reach could not be unscaled; scale "
            "the sum of the losses with one scaler, or run one backward for each"
        )


class _OpenScope(torch.autograd.Function):
    """Identity; the first node that a backward from its outputs runs."""

    @staticmethod
    def forward(ctx: Any, scope: BackwardScope, fresh: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.scope = scope
        ctx.set_materialize_grads(False)
        if fresh:
            ctx.mark_dirty(*tensors)
            return tensors
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        _register(ctx.scope)
        return (None, None, *grads)


def _identity(scope: BackwardScope, fresh: bool, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    with torch.enable_grad():  # hooks run without it, and may have to open a scope for a backward of their own
        return _OpenScope.apply(scope, fresh, *tensors)


def open_scope(value: _T, scope: BackwardScope, *, fresh: bool = False) -> _T:
    """Return ``value`` unchanged, but make a backward from it run in ``scope``.

    It does not multiply: seed the backward with gradients that already carry the scale, or use
    ``LossScaler.scale``.

    Args:
        value: a tensor, or a tuple or list of anything; tensors that need no gradient pass through.
        scope: what ops and hooks of that backward will find.
        fresh: the tensors are nobody else's, and are returned themselves. Others come back as views, which cannot be
            detached in place.
    """
    if isinstance(value, Tensor):
        return _identity(scope, fresh, [value])[0] if value.requires_grad else value  # type: ignore[return-value]
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"open_scope takes a tensor or a tuple of them, got {type(value).__name__}")
    items: list[Any] = list(value)
    places = [i for i, item in enumerate(items) if isinstance(item, Tensor) and item.requires_grad]
    if places:
        for i, tensor in zip(places, _identity(scope, fresh, [items[i] for i in places]), strict=True):
            items[i] = tensor
    if hasattr(value, "_fields"):
        return type(value)(*items)  # type: ignore[return-value]  # a named tuple
    return type(value)(items)  # type: ignore[return-value,call-arg]


def scoped(roots: Sequence[Tensor], scope: BackwardScope) -> Sequence[Tensor]:
    """Return tensors from which a backward runs in ``scope``, as :func:`open_scope` does: where they can, the roots
    themselves, with a hook in place of a node and a view for each microbatch.

    Args:
        roots: the only tensors that the backward begins with.
        scope: what ops and hooks of that backward will find.
    """
    if any(root.is_leaf or backward_hooks(root) for root in roots):  # hooks are called in their order
        return open_scope(tuple(roots), scope)

    def begin(_: Tensor) -> None:
        _register(scope)

    for root in roots:
        root.register_hook(begin)
    return roots


@contextmanager
def at_once(factor: Tensor | None = None) -> Iterator[None]:
    """Make the sinks that this thread calls inside do their work at once, also where it is deferred otherwise. For an
    op that makes its operands piece by piece, and would have to keep all of them.

    Args:
        factor: fp32 [1]: what the operands' products lack; the scope's inv_scale has it inside.
    """
    task, scope = graph_task_id(), current_scope()
    if scope is None or (scope.deferred is None and factor is None):
        yield
        return
    if factor is not None:
        scope = scope.on(factor.device)
        scope = replace(scope, inv_scale=scope.inv_scale * factor)
    before, _OWN.scope = _OWN.scope, (task, replace(scope, deferred=None))
    try:
        yield
    finally:
        _OWN.scope = before


def leave_to_norm(found_inf: Tensor) -> None:
    """Say that whoever ends the step takes the norm of every main gradient, and raises this flag if it is not finite:
    a product that would need a pass of its own to find that out may leave it. (Main gradients are only added to, so
    what is not finite stays so.) Kernels that see their sums anyway go on to raise the flag.
    """
    found_inf.spu_left_to_norm = True  # type: ignore[attr-defined]  # read by kernels, which get the tensor alone


class MainGrad(NamedTuple):
    """The place where an op adds a gradient: the last arguments of ``linear_dw_``, ``linear_db_`` and ``unscale_``.

    Attributes:
        main_grad: fp32, contiguous.
        inv_scale: fp32 [1], the contribution's factor.
        found_inf: fp32 [1], set to 1 if a contribution is not finite; never reset.
        accumulate: False stores without reading what is there.
    """

    main_grad: Tensor
    inv_scale: Tensor
    found_inf: Tensor
    accumulate: bool


class GradSink(Protocol):
    """Takes the gradient of one parameter in the backward of a fused op, inside a scope.

    Called in the backward's thread, with ``current_scope()`` set. ``spu.ops.linear_dw_``, ``linear_db_``,
    ``embedding_dw_`` and ``unscale_`` do the work; where ``current_scope().deferred`` is a list, append a call to it
    instead, which keeps the tensors, the scope and the backend's name.

    Attributes:
        attached: kept by `attach_sink` and `detach_sink`: for the sink of one parameter, whether it is the parameter's.
    """

    attached: bool

    def linear_weight(self, dz: Tensor, x: Tensor, backend: str) -> None:
        """Add dw = dz.T @ x, with dz [..., N] and x [..., K] in the storage dtype, dz still scaled."""

    def linear_weights(self, others: Sequence[GradSink], dzs: Sequence[Tensor], x: Tensor, backend: str) -> None:
        """Do what ``linear_weight`` of this sink and of the others does, each with its own dz and all with one x, which
        some backends read once for all.
        """
        for sink, dz in zip((self, *others), dzs, strict=True):
            sink.linear_weight(dz, x, backend)

    def experts_weight(self, dzs: Sequence[Tensor], x: Tensor, ends: Tensor, backend: str) -> None:
        """Add dw [E, out, in] of a mixture of experts: for each, [dzs].T @ x of its rows (``reference.experts``)."""

    def linear_bias(self, dz: Tensor, backend: str) -> None:
        """Add db = sum over rows of dz, still scaled."""

    def linear_weight_and_bias(self, dz: Tensor, x: Tensor, bias_sink: GradSink, backend: str) -> None:
        """Do what ``linear_weight`` and ``bias_sink.linear_bias`` do: some backends read dz once for both."""
        self.linear_weight(dz, x, backend)
        bias_sink.linear_bias(dz, backend)

    def embedding_weight(self, dy: Tensor, ids: Tensor, padding_idx: int, backend: str) -> None:
        """Add the rows of dy [..., C], still scaled, to those that ids [...] name, but for ``padding_idx``."""

    def summed(self, grad: Tensor, backend: str) -> None:
        """Add a gradient that is summed up already, in fp32 and still scaled."""


_SINKS: TensorTable[GradSink] = TensorTable()


def attach_sink(param: Tensor, sink: GradSink) -> None:
    """Make fused ops give this parameter's gradient to ``sink`` (inside a scope). Replaces an earlier sink.

    Hold the parameter weakly in the sink (``torch.utils.weak.TensorWeakRef``), or neither is ever freed.
    """
    if not param.is_leaf:
        raise ValueError("a sink belongs to a leaf tensor (a parameter), not to the result of an operation")
    detach_sink(param)
    _SINKS[param], sink.attached = sink, True
    wide_sums.install(_makes_main_grads)


def detach_sink(param: Tensor) -> None:
    """Remove the parameter's sink, if it has one."""
    sink = _SINKS.pop(param)
    if sink is not None:
        sink.attached = False


def sink_of(param: Tensor) -> GradSink | None:
    """Return the parameter's sink, or None."""
    return _SINKS.get(param)


def _is_own(hook: Callable[..., Any]) -> bool:
    return hasattr(getattr(hook, "__self__", None), "linear_weight")  # a method of a sink


def may_be_main_grad(grad: Tensor, param: Tensor) -> bool:
    """Tell whether a fused op can write a parameter's fp32 gradient into this tensor."""
    return (
        grad.dtype == torch.float32
        and grad.layout == torch.strided
        and grad.is_contiguous()
        and grad.shape == param.shape
        and grad.device == param.device
    )


def has_foreign_hook(param: Tensor) -> bool:
    """Tell whether someone else's tensor hook is to see or change the parameter's gradient."""
    hooks: dict[int, Callable[..., Any]] | None = backward_hooks(param)
    return hooks is not None and not all(map(_is_own, hooks.values()))


def accumulates(node: Any) -> bool:
    """Tell whether the backward that runs now will add to the ``grad`` of the parameter with this AccumulateGrad node.

    It will not if it was asked for the gradients of other tensors, or for this one's as a result
    (``torch.autograd.grad``, ``backward(inputs=...)``).
    """
    try:
        return will_execute(node)
    except RuntimeError:  # what it says of a leaf whose gradient autograd.grad returns
        return False


def place_of(node: Any, param: Tensor) -> int:
    """Return the place of a leaf among ``node.next_functions``, which has none for what was given as None."""
    for place, (edge, _) in enumerate(node.next_functions):
        if getattr(edge, "variable", None) is param:
            return place
    raise AssertionError("not an input of this node")


def sinks_of(node: Any, parameters: Sequence[Tensor | None]) -> list[GradSink | None]:
    """Return the sink that takes each parameter's gradient in a fused op's backward; None: the op returns it to
    autograd.

    It is returned for None and outside a scope, where the gradient is not to be added to the parameter's, and where a
    hook of the user's on the parameter is to see it (in the operands' dtype and scaled, as in torch).

    Args:
        node: the op's ``ctx``.
        parameters: leaves among the op's tensor inputs that may have a gradient, and None.
    """
    scope = current_scope()
    if scope is None:
        return [None for _ in parameters]
    edges = None if scope.whole else node.next_functions
    found: list[GradSink | None] = []
    for param in parameters:
        if (
            param is None
            or (edges is not None and not accumulates(edges[place_of(node, param)][0]))
            or has_foreign_hook(param)
        ):
            found.append(None)
        else:
            found.append(_SINKS.get(param) or (scope.adopt and scope.adopt(param)))
    return found
