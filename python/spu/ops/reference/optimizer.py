"""The definition of the optimizer's ops, in plain torch, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spu.common.raw import flat
from spu.ops.masters import joined, master_noise, masters_of, split
from spu.ops.moments import load_moment, moments_of, noise, stored_moment

__all__ = ["IMPLEMENTATIONS", "adamw_", "adamw_on_device", "adamw_plain", "follow", "grad_sqnorm"]


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    grad_scale: Tensor,
    found_inf: Tensor,
    *hyper: float,
) -> None:
    """Update every parameter by AdamW (Loshchilov and Hutter, arXiv:1711.05101), in torch's order of operations.

    Bit-equal in fp32 to ``torch.optim.AdamW(foreach=False, fused=False)`` on the CPU. ``masters`` is empty for fp32
    parameters, and has corrections instead of masters where these have a narrower form (``masters.py``); all parameters
    of a call share one dtype and device, one form of masters and one of moments (``moments.py``).
    ``hyper``: lr, beta1, beta2, eps, weight_decay.
    """
    on_host = bool(params) and params[0].device.type == "cpu"
    if on_host and found_inf.item() != 0:
        return
    for row in zip(params, masters or params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        param, kept, grad, first, second, step = row
        grad = grad.to(torch.float32)  # itself, or bf16 widened
        narrow = not kept.is_floating_point()
        target = joined(param, kept) if narrow else kept
        if kept is not param and not narrow:
            follow(kept, param)
        average = load_moment(first, target.shape, signed=True)
        square = load_moment(second, target.shape, signed=False)
        if on_host:
            _adamw_on_host(target, grad, average, square, step, grad_scale, *hyper)
        else:
            adamw_on_device(target, grad, average, square, step, grad_scale, found_inf, *hyper)
        bits, keep = noise(target.numel(), step), found_inf.squeeze() == 0
        if average is not first:
            for moment, values, mine, signed in (
                (first, average, bits & 0xFFFF, True),
                (second, square, bits >> 16, False),
            ):
                made = stored_moment(values, moments_of(moment), mine, signed=signed)
                moment.copy_(torch.where(keep, made, moment))
        if narrow:
            weight, correction = split(target, param.dtype, masters_of(kept), master_noise(bits))
            param.copy_(torch.where(keep, weight, param))
            kept.copy_(torch.where(keep, correction, kept))
        else:
            param.copy_(kept)


def follow(master: Tensor, weight: Tensor) -> None:
    """Take a 16-bit weight into its fp32 master where somebody has changed the weight since the last update.

    Element by element: one that the master still rounds to keeps the master's low bits. A version counter would not do:
    writes through ``.data`` leave it. Nothing waits for the device.
    """
    rounded = master.to(weight.dtype)
    if master.device.type == "cpu" and _same_bits(rounded, weight):
        return  # as nearly always, at a tenth of what the pass below costs
    torch.where(rounded == weight, master, weight.to(master.dtype), out=master)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare the bits of two 16-bit tensors, four elements at a time, because torch compares them one by one."""
    if not (a.is_contiguous() and b.is_contiguous() and a.storage_offset() % 4 == b.storage_offset() % 4 == 0):
        return torch.equal(a, b)
    a, b, even = flat(a), flat(b), a.numel() // 4 * 4
    return torch.equal(a[:even].view(torch.int64), b[:even].view(torch.int64)) and torch.equal(a[even:], b[even:])


def adamw_plain(
    target: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    found_inf: Tensor,
    *hyper: float,
) -> None:
    """Update an fp64 or complex parameter, complex ones as pairs of real numbers, as torch does."""
    values = target, grad, exp_avg, exp_avg_sq
    if target.is_complex():
        values = tuple(torch.view_as_real(value.resolve_conj()) for value in values)  # type: ignore[assignment]
    if target.device.type != "cpu":
        adamw_on_device(*values, step, grad_scale, found_inf, *hyper)
    elif found_inf.item() == 0:
        _adamw_on_host(*values, step, grad_scale, *hyper)


def _adamw_on_host(
    target: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, grad_scale: Tensor, *hyper: float
) -> None:
    count, (lr, beta1, beta2, eps, weight_decay) = step.item(), hyper
    target.mul_(1 - lr * weight_decay)
    g = grad * grad_scale.squeeze()
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    step_size = lr / (1 - beta1**count)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**count) ** 0.5).add_(eps)
    target.addcdiv_(exp_avg, denominator, value=-step_size)


def adamw_on_device(
    target: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    found_inf: Tensor,
    *hyper: float,
) -> None:
    """Do the same update without a host sync: the step number and found_inf are read on the device only."""
    lr, beta1, beta2, eps, weight_decay = hyper
    keep = found_inf.squeeze() == 0  # zero-dimensional, like all scalars here: a parameter may be that too
    count = step.squeeze().double()
    step_size = (lr / (1 - beta1**count)).to(target.dtype)
    root_correction = (1 - beta2**count).sqrt().to(target.dtype)
    g = grad * grad_scale.squeeze()
    average = exp_avg.lerp(g, 1 - beta1)
    square = (exp_avg_sq * beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (square.sqrt() / root_correction).add_(eps)
    moved = (target * (1 - lr * weight_decay)).sub_(average.div(denominator).mul_(step_size))
    for old, new in ((exp_avg, average), (exp_avg_sq, square), (target, moved)):
        old.copy_(torch.where(keep, new, old))


def grad_sqnorm(grads: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements of all gradients, -> fp64 [1]."""
    squares = [torch.linalg.vector_norm(grad, dtype=torch.float64).square() for grad in grads]
    return torch.stack(squares).sum().reshape(1)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"adamw_": adamw_, "grad_sqnorm": grad_sqnorm}
