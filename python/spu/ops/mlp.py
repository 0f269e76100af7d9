"""``mlp``: act(x @ w_in.T + b_in) @ w_out.T + b_out, with a backward that knows the loss scale.

The backward keeps x and the pre-activation z alone (relu: its result h); h = act(z) is made again where the second
weight's gradient needs it, in the epilogue of the product that makes its own gradient. With dy the scaled gradient of
the result:

    dz = (dy @ w_out) * act'(z)             fp32, rounded once to the storage dtype; the rest uses the rounded value
    b_in: the sum over rows of dz           fp32, from the same product's epilogue
    dx = dz @ w_in                          storage dtype, still scaled
    w_in, w_out, b_out: dz.T @ x, dy.T @ h, the sum over rows of dy

all four by the parameters' sinks, inside a scope; else plain gradients.
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
from spu.ops.dispatch import choose_backend
from spu.ops.in_place import weight_sinks_of
from spu.ops.linear import bias_gradient, check_operands, compute_dtype, weight_gradient
from spu.ops.plain import takes
from spu.ops.reference.fused import acted
from spu.ops.reference.linear import exact, torch_activation

__all__ = ["MLP_ACTIVATIONS", "fused_mlp", "mlp"]

MLP_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], given: Sequence[Any]) -> None:
    x, w_in, _, w_out, _, activation, keep = inputs
    if not keep:
        raise ValueError("spu::mlp needs keep=True to be differentiated")
    needs_x, *needs = ctx.needs_input_grad[:5]
    needs_w_in, needs_b_in, needs_w_out, _ = needs
    needs_dz = needs_x or needs_w_in or needs_b_in
    ctx.save_for_backward(
        x if needs_w_in else None,
        w_in if needs_x else None,
        w_out if needs_dz else None,
        outputs[1] if needs_dz or needs_w_out else None,
    )
    parameters = zip(given[1:], needs, strict=True)
    ctx.parameters = tuple(p if needed and p is not None and p.is_leaf else None for p, needed in parameters)
    ctx.activation = activation


def _gradients(ctx: Any, dy: Tensor, backend: str) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, w_in, b_in, w_out and b_out."""
    x, w_in, w_out, saved = ctx.saved_tensors
    needs_x, needs_w_in, needs_b_in, needs_w_out, needs_b_out = ctx.needs_input_grad[:5]
    w_in_sink, b_in_sink, w_out_sink, b_out_sink = weight_sinks_of(ctx, ctx.parameters, backend)
    transposed = bool(ctx.how) and ctx.how[1]
    dtypes = (None,) * 5 if ctx.dtypes is None else ctx.dtypes
    relu, dz, h = ctx.activation == "relu", None, saved
    sums: Any = None
    if w_out is not None:
        makes_h = needs_w_out and not relu
        dz, made, sums = schema.overload("mlp_dz", backend)(dy, w_out, saved, ctx.activation, makes_h, needs_b_in)
        h = made if makes_h else saved
    elif needs_w_out and not relu:
        h = acted(saved, ctx.activation)
    if w_out_sink is not None and b_out_sink is not None and not transposed:
        w_out_sink.linear_weight_and_bias(dy, h, b_out_sink, backend)
        d_out = d_b_out = None
    else:
        d_out = weight_gradient(w_out_sink, needs_w_out, dy, h, transposed, backend, dtypes[3])
        d_b_out = bias_gradient(b_out_sink, needs_b_out, dy, backend)
    del h, saved
    if dz is None:
        return None, None, None, d_out, d_b_out
    dx = schema.overload("linear_dx", backend)(dz, w_in) if needs_x else None
    d_in = weight_gradient(w_in_sink, needs_w_in, dz, x, transposed, backend, dtypes[1])
    if b_in_sink is not None:
        b_in_sink.summed(sums, backend)
        return dx, d_in, None, d_out, d_b_out
    return dx, d_in, sums.to(dy.dtype) if needs_b_in else None, d_out, d_b_out


def _operands(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    dtype: torch.dtype | None,
    transposed: bool,
    to: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to,
) -> tuple[Tensor | None, ...]:
    """Return x [..., K], weights [N, K] and [M, N], and biases in the dtype of the computation (None: in their own)."""
    if dtype is not None:
        x, w_in, w_out = to(x, dtype), to(w_in, dtype), to(w_out, dtype)
        b_in, b_out = (b if b is None else to(b, dtype) for b in (b_in, b_out))
    return (x, w_in.t(), b_in, w_out.t(), b_out) if transposed else (x, w_in, b_in, w_out, b_out)


_MLP = FusedOp("mlp", "mlp", 5, _save, _gradients, partial(_operands, to=narrowed))


def _check(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None, dtype: torch.dtype | None
) -> None:
    """Check the arguments, weights as [N, K] and [M, N]."""
    if not (
        x.dim() >= 1
        and w_in.dim() == w_out.dim() == 2
        and x.shape[-1] == w_in.shape[1]
        and w_out.shape[1] == w_in.shape[0]
    ):
        raise ValueError(
            f"mlp: x {tuple(x.shape)}, w_in {tuple(w_in.shape)} and w_out {tuple(w_out.shape)} do not fit: they must "
            "be [..., in], [hidden, in] and [out, hidden]"
        )
    for name, bias, weight in (("b_in", b_in, w_in), ("b_out", b_out, w_out)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"mlp: {name} {tuple(bias.shape)} must be ({weight.shape[0]},), as its weight has rows")
    check_operands("mlp", x, dtype, ("w_in", w_in), ("b_in", b_in), ("w_out", w_out), ("b_out", b_out))


def mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str = "gelu",
    *,
    dtype: torch.dtype | None = None,
    transposed: bool = False,
) -> Tensor:
    """Compute y = act(x @ w_in.T + b_in) @ w_out.T + b_out, each product accumulated in fp32 and rounded once.

    Args:
        x: [..., K] of any strides; fp16, bf16, fp32 (fp64 on the reference backend).
        w_in: [N, K], same dtype and device; b_in: [N] or None.
        w_out: [M, N]; b_out: [M] or None.
        activation: "relu", "gelu" (exact), "gelu_tanh" or "silu".
        dtype: operands are converted to it first; default: to autocast's inside ``torch.autocast``, else not at all.
        transposed: the weights are [K, N] and [N, M] (GPT-2's Conv1D).

    Returns:
        y [..., M], contiguous, in the dtype of the computation. Differentiable once in all five; keeps x and one
        [..., N] tensor for the backward, where two ``linear_act`` keep two. Works under ``torch.compile``, with
        ordinary gradients of the parameters. Torch's own ops serve what ``linear_act`` leaves to them.

    Raises:
        ValueError: shapes or devices that do not fit, or an unknown activation.
        TypeError: dtypes that differ or are not supported.
    """
    if activation not in MLP_ACTIVATIONS:
        raise ValueError(f"mlp: unknown activation {activation!r}: use one of {', '.join(map(repr, MLP_ACTIVATIONS))}")
    dtype = compute_dtype(x, dtype)
    if takes(x, w_in, b_in, w_out, b_out):
        return fused_mlp(x, w_in, b_in, w_out, b_out, activation, dtype, transposed)
    return _torch_mlp(x, w_in, b_in, w_out, b_out, activation, dtype, transposed)


@exact
def _torch_mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    dtype: torch.dtype | None,
    transposed: bool,
) -> Tensor:
    operands: tuple[Any, ...] = _operands(x, w_in, b_in, w_out, b_out, dtype, transposed)
    x, w_in, b_in, w_out, b_out = operands
    return F.linear(torch_activation(F.linear(x, w_in, b_in), activation), w_out, b_out)


def fused_mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    dtype: torch.dtype | None,
    transposed: bool = False,
) -> Tensor:
    """Compute ``mlp`` of tensors that the op takes (``plain.takes``), in ``dtype`` (None: their own)."""
    _check(x, w_in.t() if transposed else w_in, b_in, w_out.t() if transposed else w_out, b_out, dtype)
    given = (x, w_in, b_in, w_out, b_out)
    shape: tuple[int, ...] = ()
    if x.is_cuda:
        shape = (x.shape[:-1].numel(), *(w_in.shape[::-1] if transposed else w_in.shape))
    backend = choose_backend(x, dtype, op="linear", shape=shape)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if needs_grad and not torch.compiler.is_compiling():
        return Eager.apply(*given, _MLP, backend, (activation, True), (dtype, transposed))
    operands = _operands(*given, dtype, transposed)
    return without_gradient("mlp", backend, *operands, activation, needs_grad)[0]  # type: ignore[no-any-return]
