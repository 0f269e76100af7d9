"""Optimizer arithmetic on main gradients: ``adamw_``, ``grad_sqnorm``, ``grad_norm``, ``unscale_``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spu.ops import masters as master_forms
from spu.ops import moments, schema
from spu.ops.dispatch import DTYPES, choose_backend, forced_backend, status_of
from spu.ops.reference.optimizer import adamw_plain
from spu.ops.sink import MainGrad

__all__ = ["PLAIN", "adamw_", "grad_norm", "grad_sqnorm", "on_device", "unscale_"]

PLAIN = (torch.float64, torch.complex64, torch.complex128)
_GRADS = (torch.float32, torch.bfloat16)
_MASTERS = (torch.float32, *(master_forms.correction_dtype(form) for form in master_forms.MASTERS[1:]))


def _check_adamw(
    i: int, param: Tensor, grad: Tensor, master: Tensor | None, exp_avg: Tensor, exp_avg_sq: Tensor
) -> None:
    if master is None and param.dtype != torch.float32:
        raise TypeError(f"adamw_: parameter {i} is {param.dtype}: give it an fp32 master, or a correction")
    if param.dtype not in DTYPES["cpu"]:
        raise TypeError(f"adamw_: parameter {i} is {param.dtype}: use float16, bfloat16 or float32")
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if moment.dtype != exp_avg.dtype or not moments.fits(moment, param.shape) or moment.device != param.device:
            raise ValueError(
                f"adamw_: {name} {i} is {tuple(moment.shape)} on {moment.device}, but its parameter is "
                f"{tuple(param.shape)} on {param.device}; it is {moment.dtype}, exp_avg {exp_avg.dtype}: make both by "
                "spu.ops.moments.new_moment, in one form"
            )
    for name, value, allowed in (("grad", grad, _GRADS), ("master", master, _MASTERS)):
        if value is None:
            continue
        if value.dtype not in allowed:
            words = "float32, or bfloat16" if name == "grad" else "float32, or a correction, int16 or int8"
            raise TypeError(f"adamw_: {name} {i} is {value.dtype}: it must be {words}")
        if value.shape != param.shape or value.device != param.device:
            raise ValueError(
                f"adamw_: {name} {i} is {tuple(value.shape)} on {value.device}, but its parameter is "
                f"{tuple(param.shape)} on {param.device}"
            )


def _check_plain(i: int, param: Tensor, *others: Tensor) -> None:
    for name, value in zip(("grad", "exp_avg", "exp_avg_sq"), others, strict=True):
        if (value.dtype, value.shape, value.device) != (param.dtype, param.shape, param.device):
            raise TypeError(
                f"adamw_: parameter {i} is {param.dtype} {tuple(param.shape)} on {param.device}, but its {name} is "
                f"{value.dtype} {tuple(value.shape)} on {value.device}: without an fp32 master they must be alike"
            )


def _check_scalar(name: str, value: Tensor, device: torch.device | None = None) -> None:
    if value.dtype != torch.float32 or value.numel() != 1:
        raise TypeError(f"adamw_: {name} must be float32 of one element, got {value.dtype} {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"adamw_: {name} is on {value.device}, but its parameter is on {device}: move it with .to()")


def on_device(value: Tensor, device: torch.device) -> Tensor:
    """Copy to a device, without waiting where that is safe (a copy to the host must have arrived when it is read)."""
    return value.to(device, non_blocking=device.type != "cpu")


def _adamw_backend(param: Tensor, master: Tensor | None, exp_avg: Tensor) -> str:
    """Return the backend for a parameter: Triton's kernel has fp32 masters and moments only, CUDA's fp32 masters."""
    name = choose_backend(param, op="adamw_")
    corrected = master is not None and master.dtype != torch.float32
    if name in ("triton", "cuda") and corrected:
        assert master is not None
        return _reference_instead(name, "masters", master_forms.masters_of(master), "master='fp32'")
    if name != "triton" or exp_avg.dtype == torch.float32:
        return name
    if forced_backend() is None and status_of("cuda").available:
        return "cuda"
    return _reference_instead(name, "moments", moments.moments_of(exp_avg), "moments='fp32'")


def _reference_instead(name: str, what: str, form: str, fix: str) -> str:
    if forced_backend() is not None:
        other = "'cuda' or 'reference'" if what == "moments" else "'reference'"
        raise ValueError(
            f"adamw_: backend {name!r} was forced but has fp32 {what} only, these are {form}: force {other}, "
            f"or use AdamW({fix})"
        )
    _warn_of_reference(what)
    return "reference"


@lru_cache(maxsize=2)
def _warn_of_reference(what: str) -> None:
    if what == "moments":
        status = status_of("cuda")
        words = "bf16 or 8-bit moments runs in plain torch here, slower: Triton's kernel has fp32 moments only and "
        words += f"{status.reason}. To make it fast, {status.fix}"
    else:
        words = "16-bit or 8-bit masters runs in plain torch here, slower: the kernels of GPUs have fp32 masters only. "
        words += "Where there is room for 4 bytes a parameter, use AdamW(master='fp32')"
    warnings.warn(f"AdamW with {words}", RuntimeWarning, stacklevel=6)


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
    """Update every parameter by AdamW, one op call for each dtype and device; change nothing where found_inf is set.

    Decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101), torch.optim.AdamW's formula.

    Args:
        params: fp16 or bf16 with an fp32 master (they receive its value, rounded to nearest even) or with an int16 or
            int8 correction (``spu.ops.masters``), or fp32 with None; fp64 and complex ones, whose gradient and moments
            have their dtype, are stepped by plain torch operations.
        masters: fp32 masters or corrections, of the parameters' shapes; None for those that have none.
        grads: main gradients at true scale, fp32 or rounded to bf16; multiplied by ``grad_scale`` on the fly.
        exp_avgs, exp_avg_sqs: fp32 or bf16 of the parameter's shape, or 8-bit buffers (``spu.ops.moments``).
        steps: fp32 [1] each, with their parameters: the number of this update, from 1.
        grad_scale: fp32 [1], on any device: the clip coefficient.
        found_inf: fp32 [1], on any device.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; the message names the parameter's position.
    """
    groups: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    plain: list[tuple[Any, ...]] = []
    for i, row in enumerate(zip(params, grads, masters, exp_avgs, exp_avg_sqs, steps, strict=True)):
        _check_scalar(f"step {i}", row[5], row[0].device)
        if row[0].dtype in PLAIN:
            _check_plain(i, row[0], row[1], row[3], row[4])
            plain.append((row[0], row[1], row[3], row[4], row[5]))
            continue
        _check_adamw(i, *row[:5])
        kept = None if row[2] is None else row[2].dtype
        groups.setdefault((row[0].dtype, row[0].device, kept, row[3].dtype, row[1].dtype), []).append(row)
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        _check_scalar(name, value)
    for param, grad, exp_avg, exp_avg_sq, step in plain:
        scale, found = on_device(grad_scale, param.device), on_device(found_inf, param.device)
        adamw_plain(param, grad, exp_avg, exp_avg_sq, step, scale, found, lr, beta1, beta2, eps, weight_decay)
    for (dtype, device, *_), rows in groups.items():
        lists = [list(column) for column in zip(*rows, strict=True)]
        if dtype == torch.float32:
            lists[2] = []
        backend = _adamw_backend(rows[0][0], rows[0][2], rows[0][3])
        lists[1] = lists[1] if backend in ("reference", "cpu") else [grad.float() for grad in lists[1]]
        op = schema.overload("adamw_", backend)
        op(*lists, on_device(grad_scale, device), on_device(found_inf, device), lr, beta1, beta2, eps, weight_decay)
        # Ops of a Library leave no trace in version counters: autograd would not refuse a graph that holds old values.
        torch.autograd.graph.increment_version([tensor for i in (0, 2, 3, 4) for tensor in lists[i]])


@torch.no_grad()
def grad_sqnorm(grads: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all elements of all (fp32) gradients -> fp64 [1] on the first one's device; 0 for none.

    In fp64 it is finite where every gradient is: fp32 ends at norms of 1.8e19.
    """
    groups: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        if grad.dtype != torch.float32:
            raise TypeError(f"grad_sqnorm: a gradient is {grad.dtype}: main gradients are float32")
        groups.setdefault(grad.device, []).append(grad)
    total: Tensor | None = None
    for group in groups.values():
        value = schema.overload("grad_sqnorm", choose_backend(group[0], op="grad_sqnorm"))(group)
        total = value if total is None else total + value.to(total.device)
    return torch.zeros(1, dtype=torch.float64, device="cpu") if total is None else total


def grad_norm(grads: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients taken as one vector: fp32 [1], on the device (no host sync)."""
    return grad_sqnorm(grads).sqrt().to(torch.float32)


def unscale_(grad: Tensor, into: MainGrad, *, backend: str | None = None) -> None:
    """Compute main_grad (+)= inv_scale * grad, of any floating dtype and strides and of main_grad's shape."""
    main_grad = into.main_grad
    if main_grad.dtype != torch.float32 or grad.shape != main_grad.shape:
        raise ValueError(
            f"unscale_: main_grad must be float32 of shape {tuple(grad.shape)}, got {main_grad.dtype} "
            f"{tuple(main_grad.shape)}"
        )
    values = grad.detach() if grad.requires_grad else grad
    schema.overload("unscale_", backend or choose_backend(grad))(values, *into)
