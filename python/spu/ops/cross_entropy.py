"""``linear_cross_entropy``: the loss of a vocabulary projection whose logits never exist whole.

The forward keeps one number a row, the log-sum-exp. The gradient of the logits is made in the backward, from the scaled
gradient of the loss: unscaled (about 1 / (rows * vocabulary)) it would underflow in fp16. It is made for some rows at a
time, which the input gradient and the weight's sink take at once:

    dz = (softmax(hidden @ weight.T) - onehot(target)) * dloss      fp32, rounded once
    dhidden = dz @ weight,  main_grad (+)= inv_scale * dz.T @ hidden

The logits are made twice so: four products, where a plain loss takes three. A caller who needs the loss's value only
when its backward has run, as a training does, takes ``cross_entropy_share``: it leaves the logits to the backward,
where the loss scale is known and sinks take gradients, and makes value and gradients from them there. On one thread
(AVX-512, 512 rows, 8,192 words, hidden size 512 and 1,024) this takes 157 ms instead of 184, and 296 instead of 364.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spu.common.codecs import numel_of
from spu.ops import schema
from spu.ops.autograd import Eager, FusedOp
from spu.ops.dispatch import DTYPES, choose_backend
from spu.ops.linear import compute_dtype, linear_dw_
from spu.ops.plain import fake, refuse_derivatives_of_backward, takes
from spu.ops.reference.linear import exact, wide
from spu.ops.sink import MainGrad, at_once, sinks_of

__all__ = ["counted_as", "cross_entropy_share", "linear_cross_entropy"]

_CHUNK_BYTES = {"cpu": 64 << 20}  # of logit gradients at a time; every chunk reads and writes the whole weight gradient
_CHUNK_BYTES_DEVICE = 512 << 20
_COUNTED_AS: ContextVar[str] = ContextVar("counted_as", default="")


@contextlib.contextmanager
def counted_as(device_type: str) -> Iterator[None]:
    """Take as much memory as on a device of this type, while costs are counted on fake tensors of another one."""
    token = _COUNTED_AS.set(device_type)
    try:
        yield
    finally:
        _COUNTED_AS.reset(token)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], given: Sequence[Any]) -> None:
    hidden, weight, target, ignore_index = inputs
    ctx.save_for_backward(hidden, weight, target, outputs[1])
    ctx.parameter = given[1] if ctx.needs_input_grad[1] and given[1].is_leaf else None
    ctx.ignore_index = ignore_index


def _chunks(hidden: Tensor, weight: Tensor, item_bytes: int) -> Iterator[slice]:
    """Yield ranges of rows whose logits, of ``item_bytes`` each, take a bounded number of bytes."""
    limit = _CHUNK_BYTES.get(_COUNTED_AS.get() or hidden.device.type, _CHUNK_BYTES_DEVICE)
    rows, step = hidden.shape[0], max(1, limit // max(1, item_bytes * weight.shape[0]))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


class _PlainWeightGradient:
    """The sum of dz.T @ x over chunks, rounded to the storage dtype once."""

    def __init__(self, weight: Tensor, backend: str) -> None:
        self._weight, self._backend = weight, backend
        self._total: Tensor | None = None

    def add(self, dz: Tensor, x: Tensor) -> None:
        if self._weight.dtype == torch.float64:
            part = schema.overload("linear_dw", self._backend)(dz, x)
            self._total = part if self._total is None else self._total + part
            return
        accumulate = self._total is not None
        if self._total is None:
            self._total = torch.empty(self._weight.shape, dtype=torch.float32, device=dz.device)
        one = torch.ones(1, dtype=torch.float32, device=dz.device)
        linear_dw_(dz, x, MainGrad(self._total, one, torch.zeros_like(one), accumulate), backend=self._backend)

    def result(self) -> Tensor:
        total = torch.zeros_like(self._weight) if self._total is None else self._total
        return total.to(self._weight.dtype)


def _spread(
    ctx: Any, hidden: Tensor, weight: Tensor, backend: str, item_bytes: int, dz_of: Callable[[slice], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of hidden and weight, None for one that a sink has taken, from those of some rows' logits at
    a time; ``item_bytes``: what ``dz_of`` takes for each.
    """
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    (sink,) = sinks_of(ctx, (ctx.parameter,))
    plain = _PlainWeightGradient(weight, backend) if needs_weight and sink is None else None
    pieces: list[Tensor] = []
    for part in _chunks(hidden, weight, item_bytes):
        x, dz = hidden[part], dz_of(part)
        if needs_hidden:
            pieces.append(schema.overload("linear_dx", backend)(dz, weight))
        if sink is not None:
            with at_once():  # deferred work would keep the logit gradients of all pieces
                sink.linear_weight(dz, x, backend)
        elif plain is not None:
            plain.add(dz, x)
        del dz  # before the next rows' are made
    dhidden = None
    if needs_hidden:
        dhidden = pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.zeros_like(hidden)
    return dhidden, None if plain is None else plain.result()


def _gradients(ctx: Any, dloss: Tensor, backend: str) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of hidden and weight."""
    hidden, weight, target, lse = ctx.saved_tensors
    grad_rows = dloss.to(lse.dtype).contiguous()
    op = schema.overload("linear_ce_dz", backend)

    def dz_of(part: slice) -> Tensor:
        return op(hidden[part], weight, target[part], lse[part], grad_rows[part], ctx.ignore_index)  # type: ignore[no-any-return]

    return _spread(ctx, hidden, weight, backend, hidden.element_size(), dz_of)


class _AtBackward(torch.autograd.Function):
    """``apply(hidden, weight, target, factor, ignore_index, backend, dtype)``: `cross_entropy_share`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, factor: Any, *how: Any) -> Tensor:
        ctx.ignore_index, ctx.backend, dtype = how
        ctx.parameter = weight if ctx.needs_input_grad[1] and weight.is_leaf else None
        ctx.dtypes, ctx.factor = (hidden.dtype, weight.dtype), factor
        ctx.save_for_backward(*_operands(hidden, weight, dtype), target)
        wanted = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        share = hidden.new_full((), torch.nan, dtype=wanted)
        ctx.share = share.detach()  # the same memory
        return share

    @staticmethod
    def backward(ctx: Any, dshare: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_derivatives_of_backward("linear_cross_entropy", dshare)
        hidden, weight, target = ctx.saved_tensors
        count = (target != ctx.ignore_index).sum()
        grad_rows = (dshare * ctx.factor / count).to(ctx.share.dtype).expand(target.shape).contiguous()
        losses = torch.empty_like(grad_rows)
        op = schema.overload("linear_ce_and_dz", ctx.backend)
        item_bytes = hidden.element_size() + ctx.share.element_size()
        most = max((part.stop - part.start for part in _chunks(hidden, weight, item_bytes)), default=0)
        room = torch.empty(most, weight.shape[0], dtype=ctx.share.dtype, device=hidden.device)

        def dz_of(part: slice) -> Tensor:
            logits = room[: part.stop - part.start]
            losses[part], dz = op(hidden[part], weight, target[part], grad_rows[part], logits, ctx.ignore_index)
            return dz  # type: ignore[no-any-return]

        found = _spread(ctx, hidden, weight, ctx.backend, item_bytes, dz_of)
        value = losses.sum() / count * ctx.factor
        ctx.share.copy_(torch.where(ctx.factor == 0, 0, value) if isinstance(ctx.factor, Tensor) else value)
        mine = [None if grad is None else grad.to(dtype) for grad, dtype in zip(found, ctx.dtypes, strict=True)]
        return (*mine, None, None, None, None, None)


def _operands(hidden: Tensor, weight: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    return (hidden, weight) if dtype is None else (hidden.to(dtype), weight.to(dtype))


_LINEAR_CE = FusedOp(
    "linear_ce",
    "linear_cross_entropy",
    3,
    _save,
    _gradients,
    lambda hidden, weight, target, dtype: (*_operands(hidden, weight, dtype), target),
)


def _check(hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, dtype: torch.dtype | None) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)} does not fit weight {tuple(weight.shape)}: hidden "
            "must be [..., in] and weight [vocabulary, in]"
        )
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: target {tuple(target.shape)} must have the leading dimensions of hidden "
            f"{tuple(hidden.shape)}"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"linear_cross_entropy: target is {target.dtype}: convert it with .long()")
    known = hidden.is_floating_point() and (dtype or hidden.dtype) in DTYPES["reference"]
    if not known or (dtype is None and weight.dtype != hidden.dtype):
        raise TypeError(
            f"linear_cross_entropy: hidden is {hidden.dtype} and weight {weight.dtype}: both must be one of float16, "
            "bfloat16 and float32; convert one with .to(), or use torch.autocast"
        )
    if not hidden.device == weight.device == target.device:
        raise ValueError(
            f"linear_cross_entropy: hidden is on {hidden.device}, weight on {weight.device}, target on "
            f"{target.device}: move them with .to()"
        )
    values = target.is_cpu and not torch.compiler.is_compiling() and not fake(hidden, weight, target)
    if values and target.numel():
        _check_range(target, weight.shape[0], ignore_index)


def _check_range(target: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise ValueError for a target outside the vocabulary. On the CPU only: elsewhere this would be a wait."""
    low, high = (int(value) for value in torch.aminmax(target))
    if low >= 0 and high < vocabulary:
        return
    outside = target[((target < 0) | (target >= vocabulary)) & (target != ignore_index)]
    if outside.numel():
        raise ValueError(
            f"linear_cross_entropy: target {int(outside[0])} is neither in [0, {vocabulary}) nor ignore_index "
            f"{ignore_index}"
        )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """Compute the mean cross-entropy of ``hidden @ weight.T`` over the targets that are not ``ignore_index``.

    ``F.cross_entropy(F.linear(hidden, weight).float(), target)`` in much less memory: logits and their gradients exist
    for a bounded number of rows at a time.

    Args:
        hidden: [..., K]; fp16, bf16, fp32 (fp64 on the reference backend).
        weight: [V, K], same dtype and device.
        target: int64 [...], each in [0, V) or ignore_index.
        ignore_index: the target of rows that do not count.

    Returns:
        The loss, zero-dimensional, fp32 (fp64 for fp64); NaN if no target counts, as in torch. Differentiable once in
        hidden and weight. Works under ``torch.compile``; inside ``torch.autocast`` the product is in its dtype. Calls
        that ``linear_act`` leaves to torch's own ops go there too, with all logits at once.

    Raises:
        ValueError: shapes or devices that do not fit; on the CPU also a target outside the vocabulary.
        TypeError: dtypes that differ or are not supported.
    """
    dtype = compute_dtype(hidden, None)
    if not takes(hidden, weight, target):
        return _torch_cross_entropy(hidden, weight, target, ignore_index, dtype)
    _check(hidden, weight, target, ignore_index, dtype)
    rows, targets = hidden.reshape(numel_of(target.shape), hidden.shape[-1]), target.reshape(-1)
    backend = choose_backend(hidden, dtype, op="linear_ce", shape=(rows.shape[0], *weight.shape))
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        operands = _operands(rows, weight, dtype)
        losses = schema.overload("linear_ce", backend)(*operands, targets, ignore_index)[0]
    else:
        losses = Eager.apply(rows, weight, targets, _LINEAR_CE, backend, (ignore_index,), (dtype,))
    return losses.sum() / (targets != ignore_index).sum()


def cross_entropy_share(
    hidden: Tensor, weight: Tensor, target: Tensor, factor: float | Tensor, ignore_index: int = -100
) -> Tensor | None:
    """Compute factor * ``linear_cross_entropy``, whose logits are made once, in the backward.

    Args:
        hidden, weight, target, ignore_index: as there.
        factor: not differentiated; one of 0 counts nothing, not NaN.

    Returns:
        The value, zero-dimensional: NaN until its backward has run, which puts the value there. Run that once. None
        where ``linear_cross_entropy`` has to serve: no gradient is taken, or the call goes to torch's own ops.

    Raises:
        as ``linear_cross_entropy``.
    """
    dtype = compute_dtype(hidden, None)
    needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if not needed or torch.compiler.is_compiling() or not takes(hidden, weight, target):
        return None
    _check(hidden, weight, target, ignore_index, dtype)
    rows, targets = hidden.reshape(numel_of(target.shape), hidden.shape[-1]), target.reshape(-1)
    backend = choose_backend(hidden, dtype, op="linear_ce", shape=(rows.shape[0], *weight.shape))
    return _AtBackward.apply(rows, weight, targets, factor, ignore_index, backend, dtype)  # type: ignore[no-any-return,no-untyped-call]


@exact
def _torch_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, dtype: torch.dtype | None
) -> Tensor:
    logits = wide(F.linear(*_operands(hidden, weight, dtype)))
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), ignore_index=ignore_index)
