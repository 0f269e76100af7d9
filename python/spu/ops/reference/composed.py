"""Ops built from a backend's own smaller ops: what serves where the backend has no kernel of its own.

They are registered below the backend's device key, so a kernel that the backend does register takes their place. They
round where the smaller ops round (gate, up and the logits to the storage dtype), as plain torch does, and so keep the
error bound, but not the speed or the single rounding of a fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from spu.ops.reference import attention as reference_attention
from spu.ops.reference import experts, fused
from spu.ops.reference import norm as reference_norm
from spu.ops.reference.linear import wide

__all__ = [
    "IMPLEMENTATIONS",
    "copy_in_",
    "gated_dh",
    "gated_dx",
    "gated_linear",
    "gated_mlp",
    "gated_mlp_add",
    "implementation",
    "linear_add",
    "linear_ce",
    "linear_ce_and_dz",
    "linear_ce_and_dz_",
    "linear_ce_dz",
    "linear_dw_db_",
    "linear_dw_each_",
    "linear_dz_dx",
    "linear_each",
    "mlp",
    "mlp_dz",
    "pack_",
    "rms_norm_to",
    "unpack_",
]


def _op(name: str, backend: str) -> Any:
    return getattr(getattr(torch.ops.spu, name), backend)


def linear_dz_dx(backend: str, dy: Tensor, saved: Tensor, weight: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Compute the derivative, then the product."""
    dz = _op("linear_dz", backend)(dy, saved, activation)
    return dz, _op("linear_dx", backend)(dz, weight)


def linear_dw_db_(
    backend: str,
    dz: Tensor,
    x: Tensor,
    main_grad: Tensor,
    bias_grad: Tensor,
    inv_scale: Tensor,
    found_inf: Tensor,
    accumulate: bool,
) -> None:
    """Compute one after the other."""
    _op("linear_dw_", backend)(dz, x, main_grad, inv_scale, found_inf, accumulate)
    _op("linear_db_", backend)(dz, bias_grad, inv_scale, found_inf, accumulate)


def linear_add(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor) -> Tensor:
    """Compute the product, then the sum."""
    return (addend + _op("linear", backend)(x, weight, bias, "none", False)[0]).contiguous()


def linear_each(backend: str, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """Compute one product after the other."""
    linear = _op("linear", backend)
    given = biases if biases else [None] * len(weights)
    return [linear(x, w, bias, "none", False)[0] for w, bias in zip(weights, given, strict=True)]


def linear_dw_each_(
    backend: str,
    dzs: Sequence[Tensor],
    x: Tensor,
    main_grads: Sequence[Tensor],
    inv_scale: Tensor,
    found_inf: Tensor,
    accumulate: bool,
) -> None:
    """Compute one product after the other."""
    for dz, main_grad in zip(dzs, main_grads, strict=True):
        _op("linear_dw_", backend)(dz, x, main_grad, inv_scale, found_inf, accumulate)


def gated_linear(
    backend: str, x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute two products and plain torch's activation."""
    linear = _op("linear", backend)
    gate, up = (linear(x, weight, None, "none", False)[0] for weight in (w_gate, w_up))
    h = fused.gate_up(wide(gate), wide(up), activation, x.dtype)
    return (h, gate, up) if keep else (h, x.new_empty(0), x.new_empty(0))


def gated_dh(
    backend: str, dy: Tensor, w_down: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the product, then ``gated_dz``."""
    return _op("gated_dz", backend)(_op("linear_dx", backend)(dy, w_down), gate, up, activation)  # type: ignore[no-any-return]


def gated_dx(backend: str, dgate: Tensor, dup: Tensor, w_gate: Tensor, w_up: Tensor) -> Tensor:
    """Compute two products, added in fp32."""
    linear_dx = _op("linear_dx", backend)
    return (wide(linear_dx(dgate, w_gate)) + wide(linear_dx(dup, w_up))).to(dgate.dtype)


def gated_mlp(
    backend: str, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the whole block, for every backend: ``gated_linear`` and the down projection."""
    h, gate, up = _op("gated_linear", backend)(x, w_gate, w_up, activation, keep)
    return _op("linear", backend)(h, w_down, None, "none", False)[0], gate, up


def gated_mlp_add(
    backend: str, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: str, addend: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``gated_linear``, then ``linear_add``."""
    h, gate, up = _op("gated_linear", backend)(x, w_gate, w_up, activation, True)
    return _op("linear_add", backend)(h, w_down, None, addend), gate, up


def mlp(
    backend: str,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Compute two linear layers, for every backend. What is kept: the pre-activation; for relu, its result."""
    linear, relu = _op("linear", backend), activation == "relu"
    h, preact = linear(x, w_in, b_in, activation, keep and not relu)
    y = linear(h, w_out, b_out, "none", False)[0]
    return y, h if keep and relu else preact


def mlp_dz(
    backend: str, dy: Tensor, w_out: Tensor, saved: Tensor, activation: str, needs_h: bool, needs_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the product, then the derivative, and the reference's activation and sums."""
    dz = _op("linear_dz", backend)(_op("linear_dx", backend)(dy, w_out), saved, activation)
    h = fused.acted(saved, activation) if needs_h else saved.new_empty(0)
    return dz, h, fused.row_sums(dz) if needs_sums else wide(dz.new_empty(0))


def _logits(backend: str, hidden: Tensor, weight: Tensor) -> Tensor:
    return wide(_op("linear", backend)(hidden, weight, None, "none", False)[0])


def linear_ce(backend: str, hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Run the reference's loop around the backend's product."""
    return fused.cross_entropy_rows(hidden, weight, target, ignore_index, partial(_logits, backend))


def linear_ce_dz(
    backend: str, hidden: Tensor, weight: Tensor, target: Tensor, lse: Tensor, grad_rows: Tensor, ignore_index: int
) -> Tensor:
    """Apply the reference's formula to the backend's product."""
    logits = _logits(backend, hidden, weight)
    return fused.cross_entropy_dz(logits, target, lse, grad_rows, ignore_index).to(hidden.dtype)


def linear_ce_and_dz(
    backend: str, hidden: Tensor, weight: Tensor, target: Tensor, grad_rows: Tensor, logits: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Compute ``linear_ce_and_dz_`` with new memory for the gradient."""
    dz = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    op = _op("linear_ce_and_dz_", backend)
    return op(hidden, weight, target, grad_rows, logits, dz, ignore_index), dz


def linear_ce_and_dz_(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    grad_rows: Tensor,
    logits: Tensor,
    dz: Tensor,
    ignore_index: int,
) -> Tensor:
    """Apply the reference's formula to logits in fp32: a weight gradient's product, which is not rounded to 16 bits."""
    if dz.numel() == 0:
        return torch.zeros_like(grad_rows)
    one = torch.ones_like(grad_rows[:1])
    _op("linear_dw_", backend)(hidden.t(), weight.t(), logits, one, torch.zeros_like(one), False)
    return fused.cross_entropy_and_dz(logits, target, grad_rows, ignore_index, dz)


def rms_norm_to(
    backend: str, x: Tensor, weight: Tensor | None, eps: float, offset: float, rounded: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute the norm, then convert."""
    y, rstd, _ = _op("rms_norm", backend)(x, None, weight, eps, offset, rounded)
    return y if y.dtype == dtype else y.to(dtype), rstd


def pack_(backend: str, x: Tensor, codec: str, wire: Tensor) -> None:
    """Pack on x's device, then copy: by the copy engine where that is a CUDA device and the wire is pinned."""
    wire.copy_(_op("pack", backend)(x, codec), non_blocking=wire.is_cuda or wire.is_pinned())


def unpack_(backend: str, wire: Tensor, codec: str, out: Tensor) -> None:
    """Copy to out's device, then unpack there."""
    out.copy_(_op("unpack", backend)(wire.to(out.device, non_blocking=True), list(out.shape), out.dtype, codec))


def copy_in_(backend: str, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy first, convert on arrival: torch would convert on the host, and wait."""
    for source, target in zip(sources, targets, strict=True):
        as_is = source.dtype == target.dtype or source.device == target.device
        target.copy_(source if as_is else source.to(target.device, non_blocking=True), non_blocking=True)


def _reference(op: Callable[..., Any]) -> Callable[..., Any]:
    """Return the reference in the form of a composition."""

    @wraps(op)
    def run(backend: str, *args: Any) -> Any:
        return op(*args)

    return run


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    **{name: _reference(op) for name, op in reference_norm.IMPLEMENTATIONS.items()},
    **{name: _reference(op) for name, op in reference_attention.IMPLEMENTATIONS.items()},
    **experts.IMPLEMENTATIONS,
    "linear_dz_dx": linear_dz_dx,
    "linear_dw_db_": linear_dw_db_,
    "linear_each": linear_each,
    "linear_dw_each_": linear_dw_each_,
    "linear_add": linear_add,
    "gated_linear": gated_linear,
    "gated_dz": _reference(fused.gated_dz),
    "gated_dh": gated_dh,
    "gated_dx": gated_dx,
    "gated_mlp": gated_mlp,
    "gated_mlp_add": gated_mlp_add,
    "mlp": mlp,
    "mlp_dz": mlp_dz,
    "linear_ce": linear_ce,
    "linear_ce_dz": linear_ce_dz,
    "linear_ce_and_dz": linear_ce_and_dz,
    "linear_ce_and_dz_": linear_ce_and_dz_,
    "rms_norm_to": rms_norm_to,
    "pack_": pack_,
    "unpack_": unpack_,
    "copy_in_": copy_in_,
}


def implementation(name: str, backend: str) -> Callable[..., Any]:
    """Return the composition of op ``name`` from the overloads of ``backend``."""
    return partial(IMPLEMENTATIONS[name], backend)
