"""Optimizer arithmetic on main gradients: ``adamw_``, ``grad_sqnorm``, ``grad_norm``, ``unscale_``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import schema
from .dispatch import DTYPES, choose_backend


def _check_adamw(
    i: int, param: Tensor, grad: Tensor, master: Tensor | None, exp_avg: Tensor, exp_avg_sq: Tensor
) -> None:
    if master is None and param.dtype != torch.float32:
        raise TypeError(f"adamw_: parameter {i} is {param.dtype}: give it an fp32 master")
    if param.dtype not in DTYPES["cpu"]:
        raise TypeError(f"adamw_: parameter {i} is {param.dtype}: use float16, bfloat16 or float32")
    for name, value in (("grad", grad), ("master", master), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if value is None:
            continue
        if value.dtype != torch.float32:
            raise TypeError(f"adamw_: {name} {i} is {value.dtype}: it must be float32")
        if value.shape != param.shape or value.device != param.device:
            raise ValueError(
                f"adamw_: {name} {i} is {tuple(value.shape)} on {value.device}, but its parameter is "
                f"{tuple(param.shape)} on {param.device}"
            )


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    grad_scale: Tensor,
    found_inf: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW update of every parameter, one op call for each dtype and device; nothing where found_inf is set.

    Decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101), torch.optim.AdamW's formula.

    Args:
        params: fp16 or bf16 with an fp32 master (they receive its value, rounded to nearest even), or fp32 with None.
        grads: fp32 main gradients at true scale; multiplied by ``grad_scale`` on the fly, not changed.
        steps: fp32 [1] each: the number of this update, from 1.
        grad_scale: fp32 [1], the clip coefficient.
        found_inf: fp32 [1].

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; the message names the parameter's position.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[tuple[Any, ...]]] = {}
    for i, row in enumerate(zip(params, grads, masters, exp_avgs, exp_avg_sqs, steps, strict=True)):
        _check_adamw(i, *row[:5])
        groups.setdefault((row[0].dtype, row[0].device), []).append(row)
    for (dtype, _), rows in groups.items():
        lists = [list(column) for column in zip(*rows, strict=True)]
        if dtype == torch.float32:
            lists[2] = []
        op = schema.overload("adamw_", choose_backend(rows[0][0], op="adamw_"))
        op(*lists, grad_scale, found_inf, lr, beta1, beta2, eps, weight_decay)


@torch.no_grad()
def grad_sqnorm(grads: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all elements of all (fp32) gradients -> fp32 [1] on the first one's device; 0 for none."""
    groups: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        if grad.dtype != torch.float32:
            raise TypeError(f"grad_sqnorm: a gradient is {grad.dtype}: main gradients are float32")
        groups.setdefault(grad.device, []).append(grad)
    total: Tensor | None = None
    for group in groups.values():
        value = schema.overload("grad_sqnorm", choose_backend(group[0], op="grad_sqnorm"))(group)
        total = value if total is None else total + value.to(total.device)
    return torch.zeros(1) if total is None else total


def grad_norm(grads: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients taken as one vector -> fp32 [1], on the device (no host sync)."""
    return grad_sqnorm(grads).sqrt()


@torch.no_grad()
def unscale_(
    grad: Tensor,
    main_grad: Tensor,
    inv_scale: Tensor,
    found_inf: Tensor,
    *,
    accumulate: bool,
    backend: str | None = None,
) -> None:
    """main_grad (+)= inv_scale * grad in fp32; found_inf (fp32 [1]) becomes 1 if a value is not finite.

    Args:
        grad: any floating dtype and strides, the shape of ``main_grad``.
        main_grad: fp32, contiguous.
        accumulate: False stores without reading.
    """
    if main_grad.dtype != torch.float32 or grad.shape != main_grad.shape:
        raise ValueError(
            f"unscale_: main_grad must be float32 of shape {tuple(grad.shape)}, got {main_grad.dtype} "
            f"{tuple(main_grad.shape)}"
        )
    op = schema.overload("unscale_", backend or choose_backend(grad))
    op(grad, main_grad, inv_scale, found_inf, accumulate)
