"""``linear_cross_entropy``: the loss of a vocabulary projection whose logits never exist whole.

The gradient of the logits is made in fp32 for some rows at a time and rounded once:

    dz = (softmax(hidden @ weight.T) - onehot(target)) * unit      unit: a power of two, 2^15 for fp16, else 1
    dhidden = factor * (dz @ weight)                                 factor = dloss / (rows * unit)
    main_grad (+)= inv_scale * factor * dz.T @ hidden

The loss is a mean, so its gradient is one factor for all rows. It is multiplied in fp32 into the products of dz, before
their only rounding: in fp16 dz * dloss would underflow without a loss scale, about 1 / (rows * vocabulary), and
overflow with a large one. So the forward on a CPU makes value and dz from the same logits, three products as in plain
torch, and keeps dz. What would take more than ``_kept_rows`` allows is made again in the backward, from the
log-sum-exp of each row, as it is on other devices and under ``torch.compile``: there from the scaled gradient of the
loss, which is put into dz.

A caller who needs the loss's value only when its backward has run, as a training does, takes ``cross_entropy_share``:
it leaves the logits to the backward and makes value and gradients from them there, and keeps nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spu.common.codecs import numel_of
from spu.ops import schema
from spu.ops.autograd import Eager, Function, FusedOp, without_gradient
from spu.ops.dispatch import DTYPES, choose_backend, has_kernel
from spu.ops.linear import compute_dtype
from spu.ops.logit_gradients import spread
from spu.ops.plain import fake, refuse_derivatives_of_backward, takes
from spu.ops.reference.linear import exact, wide

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


def _device_type(hidden: Tensor) -> str:
    return _COUNTED_AS.get() or hidden.device.type


def _chunk_bytes(hidden: Tensor) -> int:
    return _CHUNK_BYTES.get(_device_type(hidden), _CHUNK_BYTES_DEVICE)


def _chunks(hidden: Tensor, weight: Tensor, item_bytes: int, rows: slice = slice(None)) -> Iterator[slice]:
    """Yield ranges of rows whose logits, of ``item_bytes`` each, take a bounded number of bytes."""
    first, end, _ = rows.indices(hidden.shape[0])
    step = max(1, _chunk_bytes(hidden) // max(1, item_bytes * weight.shape[0]))
    return (slice(start, min(end, start + step)) for start in range(first, end, step))


def _rows(tensor: Tensor, part: slice) -> Tensor:
    """Return some rows; all as they are, for a view costs as much as a small op."""
    return tensor if part.stop - part.start == len(tensor) else tensor[part]


def _kept_rows(hidden: Tensor, weight: Tensor) -> int:
    """Return of how many rows dz is kept: it may take what a chunk takes, which the backward needs in any case, or the
    bytes of the weight, whose gradient takes as much.
    """
    row_bytes = max(1, weight.shape[0] * weight.element_size())
    return min(hidden.shape[0], max(_chunk_bytes(hidden), weight.shape[1] * row_bytes) // row_bytes)


def _gradients(ctx: Any, dloss: Tensor, backend: str) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of hidden and weight."""
    hidden, weight, target, lse = ctx.saved_tensors
    grad_rows = dloss.to(lse.dtype).contiguous()
    op = schema.overload("linear_ce_dz", backend)

    def dz_of(part: slice) -> Tensor:
        return op(hidden[part], weight, target[part], lse[part], grad_rows[part], ctx.ignore_index)  # type: ignore[no-any-return]

    return spread(ctx, hidden, weight, backend, list(_chunks(hidden, weight, hidden.element_size())), dz_of)


def _losses_and_dz(backend: str, given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int], dz: Tensor) -> Tensor:
    """Return the losses of ``linear_ce_and_dz(*given)`` and write its gradient to ``dz``, which may be the logits'."""
    if has_kernel("linear_ce_and_dz_", backend):
        *rows, ignore_index = given
        return schema.overload("linear_ce_and_dz_", backend)(*rows, dz, ignore_index)  # type: ignore[no-any-return]
    losses, made = schema.overload("linear_ce_and_dz", backend)(*given)
    dz.copy_(made)
    return losses  # type: ignore[no-any-return]


class _AtForward(Function):
    """``apply(hidden, weight, target, ignore_index, backend, dtype, keep)``: the mean loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, *how: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.ignore_index, ctx.backend, dtype, keep = how
        ctx.parameter = weight if ctx.needs_input_grad[1] and weight.is_leaf else None
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight = _operands(hidden, weight, dtype)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        ctx.unit = 2.0**15 if hidden.dtype == torch.float16 else 1.0
        rows, kept = hidden.shape[0], _kept_rows(hidden, weight) if keep else 0
        units = hidden.new_full((rows,), ctx.unit, dtype=wide)
        dz = hidden.new_empty(kept, weight.shape[0])
        losses: list[Tensor] = []
        room: Tensor | None = None
        for part in _chunks(hidden, weight, wide.itemsize, slice(kept)):
            x, targets, grads, made = (_rows(t, part) for t in (hidden, target, units, dz))
            logits = made
            if wide != hidden.dtype:
                room = torch.empty_like(logits, dtype=wide) if room is None else room  # the first part is the largest
                logits = room[: part.stop - part.start]
            losses.append(_losses_and_dz(ctx.backend, (x, weight, targets, grads, logits, ctx.ignore_index), made))
        lse: Tensor | None = None
        if kept < rows or rows == 0:
            op = schema.overload("linear_ce", ctx.backend)
            more, lse = op(hidden[kept:], weight, target[kept:], ctx.ignore_index)
            losses.append(more)
        count = (target != ctx.ignore_index).sum()
        ctx.save_for_backward(hidden, weight, target, dz, lse, count)
        return (losses[0] if len(losses) == 1 else torch.cat(losses)).sum() / count

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dloss is None:
            return (None,) * 7
        refuse_derivatives_of_backward("linear_cross_entropy", dloss)
        hidden, weight, target, kept, lse, count = ctx.saved_tensors
        op, rows = schema.overload("linear_ce_dz", ctx.backend), len(kept)
        factor = torch.where(count == 0, 0, dloss / count / ctx.unit).reshape(1)
        finite = fake(factor) or math.isfinite(factor)

        def dz_of(part: slice) -> Tensor:
            dz = kept
            if part.start >= rows:
                sums = lse[part.start - rows : part.stop - rows]
                dz = op(hidden[part], weight, target[part], sums, torch.full_like(sums, ctx.unit), ctx.ignore_index)
            if finite:
                return dz
            counted = (target[part] != ctx.ignore_index)[:, None]
            return torch.where(counted, dz * factor, 0).to(dz.dtype)  # not finite where torch's is not

        parts = [slice(0, rows)] if rows else []
        parts += _chunks(hidden, weight, hidden.element_size(), slice(rows, None))
        found = spread(ctx, hidden, weight, ctx.backend, parts, dz_of, factor if finite else None)
        mine = [None if grad is None else grad.to(dtype) for grad, dtype in zip(found, ctx.dtypes, strict=True)]
        return (*mine, *[None] * 5)


class _AtBackward(Function):
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

        found = spread(ctx, hidden, weight, ctx.backend, list(_chunks(hidden, weight, item_bytes)), dz_of)
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


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100, *, keep: bool = True
) -> Tensor:
    """Compute the mean cross-entropy of ``hidden @ weight.T`` over the targets that are not ``ignore_index``.

    ``F.cross_entropy(F.linear(hidden, weight).float(), target)`` in much less memory: logits and their gradients exist
    for a bounded number of rows at a time.

    Args:
        hidden: [..., K]; fp16, bf16, fp32 (fp64 on the reference backend).
        weight: [V, K], same dtype and device.
        target: int64 [...], each in [0, V) or ignore_index.
        ignore_index: the target of rows that do not count.
        keep: on a CPU, where gradients are wanted, keep the gradient of the logits from the forward to the backward
            for as many rows as fit into 64 MiB or into the bytes of the weight, whichever is more. False: keep nothing
            and make the logits twice, in more time.

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
        losses = without_gradient("linear_ce", backend, *operands, targets, ignore_index)[0]
    elif _device_type(rows) == "cpu" and (rows.requires_grad or weight.requires_grad):
        return _AtForward.apply(rows, weight, targets, ignore_index, backend, dtype, keep)  # type: ignore[no-any-return]
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
    return _AtBackward.apply(rows, weight, targets, factor, ignore_index, backend, dtype)  # type: ignore[no-any-return]


@exact
def _torch_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, dtype: torch.dtype | None
) -> Tensor:
    logits = wide(F.linear(*_operands(hidden, weight, dtype)))
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), ignore_index=ignore_index)
