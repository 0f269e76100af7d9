"""``gated_mlp``: (act(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T, with a backward that knows the loss scale.

The backward keeps x, gate and up alone (the two pre-products, in the storage dtype): h = act(gate) * up is recomputed
where the down projection's weight gradient needs it. With dy the scaled gradient of the result:

    dh = dy @ w_down
    dgate = dh * up * act'(gate), dup = dh * act(gate)        fp32, rounded once
    dx = dgate @ w_gate + dup @ w_up                          one fp32 accumulation, rounded once, still scaled
    weights: dgate.T @ x, dup.T @ x, dy.T @ h                 by the parameters' sinks, inside a scope; else plain

SwiGLU and its relatives: Shazeer, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spu.ops import schema
from spu.ops.autograd import Eager, FusedOp, without_gradient
from spu.ops.convert import narrowed
from spu.ops.dispatch import choose_backend, has_kernel
from spu.ops.in_place import weight_sinks_of
from spu.ops.linear import check_operands, compute_dtype, weight_gradient, weight_gradients
from spu.ops.plain import takes
from spu.ops.reference.linear import exact, torch_activation
from spu.ops.sink import GradSink

__all__ = ["GATED_ACTIVATIONS", "fused_gated_mlp", "gated_gradients", "gated_mlp"]

GATED_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], given: Sequence[Any]) -> None:
    x, w_gate, w_up, w_down, activation, keep = inputs
    if not keep:
        raise ValueError("spu::gated_mlp needs keep=True to be differentiated")
    needs_x, *needs_weights = ctx.needs_input_grad[:4]
    needs_gate_or_up = needs_weights[0] or needs_weights[1]
    ctx.save_for_backward(
        x if needs_gate_or_up else None,
        w_gate if needs_x else None,
        w_up if needs_x else None,
        w_down if needs_x or needs_gate_or_up else None,
        *outputs[1:],
    )
    weights = zip(given[1:], needs_weights, strict=True)
    ctx.parameters = tuple(w if needed and w.is_leaf else None for w, needed in weights)
    ctx.activation = activation


def gated_gradients(
    dy: Tensor,
    saved: Sequence[Tensor | None],
    needs: Sequence[bool],
    sinks: Sequence[GradSink | None],
    activation: str,
    backend: str,
    dtypes: Sequence[torch.dtype | None] = (None, None, None),
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, w_gate, w_up and w_down, for which ``needs`` says which are wanted.

    Args:
        dy: [..., M], still scaled.
        saved: x, w_gate, w_up, w_down, gate and up; the first four may be None where ``needs`` allows (``_save``).
        sinks: of the three weights; where there is one, it takes the gradient.
        dtypes: of the three parameters (``weight_gradient``).
    """
    x, w_gate, w_up, w_down, gate, up = saved
    needs_x, needs_gate, needs_up, needs_down = needs
    if w_down is not None and has_kernel("gated_dh", backend):
        dgate, dup, h = schema.overload("gated_dh", backend)(dy, w_down, gate, up, activation)
    else:
        # Where only w_down learns, dh is not needed: gate stands in, and of the result only h is used.
        dh = gate if w_down is None else schema.overload("linear_dx", backend)(dy, w_down)
        dgate, dup, h = schema.overload("gated_dz", backend)(dh, gate, up, activation)
        del dh
    d_down = weight_gradient(sinks[2], needs_down, dy, h, False, backend, dtypes[2])
    del h
    dx = schema.overload("gated_dx", backend)(dgate, dup, w_gate, w_up) if needs_x else None
    both = sinks[:2], (needs_gate, needs_up), (dgate, dup), x, backend, dtypes[:2]
    return dx, *weight_gradients(*both), d_down  # type: ignore[arg-type]


def _gradients(ctx: Any, dy: Tensor, backend: str) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, w_gate, w_up and w_down."""
    sinks = weight_sinks_of(ctx, ctx.parameters, backend)
    dtypes = (None,) * 3 if ctx.dtypes is None else ctx.dtypes[1:]
    return gated_gradients(dy, ctx.saved_tensors, ctx.needs_input_grad[:4], sinks, ctx.activation, backend, dtypes)


def _operands(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    dtype: torch.dtype | None,
    to: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to,
) -> tuple[Tensor, ...]:
    """Return the tensors in the dtype of the computation (None: in their own)."""
    operands = x, w_gate, w_up, w_down
    return operands if dtype is None else tuple(to(operand, dtype) for operand in operands)


_GATED_MLP = FusedOp("gated_mlp", "gated_mlp", 4, _save, _gradients, partial(_operands, to=narrowed))


def _check(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, dtype: torch.dtype | None) -> None:
    fits = (
        x.dim() >= 1
        and w_gate.dim() == w_up.dim() == w_down.dim() == 2
        and w_gate.shape == w_up.shape
        and x.shape[-1] == w_gate.shape[1]
        and w_down.shape[1] == w_gate.shape[0]
    )
    if not fits:
        raise ValueError(
            f"gated_mlp: x {tuple(x.shape)}, w_gate {tuple(w_gate.shape)}, w_up {tuple(w_up.shape)} and w_down "
            f"{tuple(w_down.shape)} do not fit: they must be [..., in], [hidden, in], [hidden, in] and [out, hidden]"
        )
    check_operands("gated_mlp", x, dtype, ("w_gate", w_gate), ("w_up", w_up), ("w_down", w_down))


def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str = "silu",
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute y = (act(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T: SwiGLU for "silu", GEGLU for the gelus.

    Args:
        x: [..., K] of any strides; fp16, bf16, fp32 (fp64 on the reference backend).
        w_gate, w_up: [N, K], same dtype and device.
        w_down: [M, N].
        activation: "silu", "gelu" (exact) or "gelu_tanh".
        dtype: operands are converted to it first; default: to autocast's inside ``torch.autocast``, else not at all.

    Returns:
        y [..., M], contiguous, in the dtype of the computation. Differentiable once in all four; keeps x and two
        [..., N] tensors for the backward. Works under ``torch.compile``, with ordinary gradients of the weights.
        Torch's own ops serve what ``linear_act`` leaves to them.

    Raises:
        ValueError: shapes or devices that do not fit, or an unknown activation.
        TypeError: dtypes that differ or are not supported.
    """
    if activation not in GATED_ACTIVATIONS:
        raise ValueError(
            f"gated_mlp: unknown activation {activation!r}: use one of {', '.join(map(repr, GATED_ACTIVATIONS))}"
        )
    dtype = compute_dtype(x, dtype)
    if takes(x, w_gate, w_up, w_down):
        return fused_gated_mlp(x, w_gate, w_up, w_down, activation, dtype)
    return _torch_gated_mlp(x, w_gate, w_up, w_down, activation, dtype)


@exact
def _torch_gated_mlp(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: str, dtype: torch.dtype | None
) -> Tensor:
    x, w_gate, w_up, w_down = _operands(x, w_gate, w_up, w_down, dtype)
    return F.linear(torch_activation(F.linear(x, w_gate), activation) * F.linear(x, w_up), w_down)


def fused_gated_mlp(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: str, dtype: torch.dtype | None
) -> Tensor:
    """Compute ``gated_mlp`` of tensors that the op takes (``plain.takes``), in ``dtype`` (None: their own)."""
    _check(x, w_gate, w_up, w_down, dtype)
    operands = (x, w_gate, w_up, w_down)
    shape = (x.shape[:-1].numel(), *w_gate.shape) if x.is_cuda else ()
    backend = choose_backend(x, dtype, op="gated_linear", shape=shape)
    needs_grad = torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)
    if needs_grad and not torch.compiler.is_compiling():
        return Eager.apply(*operands, _GATED_MLP, backend, (activation, True), (dtype,))
    return without_gradient("gated_mlp", backend, *_operands(*operands, dtype), activation, needs_grad)[0]  # type: ignore[no-any-return]
