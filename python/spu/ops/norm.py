"""``rms_norm`` and ``layer_norm``: statistics in fp32, one rounding, parameter gradients summed in fp32.

The forward keeps what was normalised and one number a row (LayerNorm: two). With n the normalised row and g = dy *
weight, both in fp32:

    dx = rstd * (g - n * mean(g n))               LayerNorm: less mean(g) as well; rounded once, still scaled
    dweight = sum over rows of dy * n             fp32, in an order that threads do not change
    dbias = sum over rows of dy

With a residual, v = x + residual is rounded once and normalised, and returned beside the result: the gradient that
comes back for it is added to dx before that is rounded. Zhang and Sennrich, arXiv:1910.07467; Ba et al., 1607.06450.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spu.common.torch_private import BelowAutograd
from spu.ops import schema
from spu.ops.autograd import Function
from spu.ops.dispatch import DTYPES, choose_backend
from spu.ops.plain import refuse_derivatives_of_backward, takes
from spu.ops.reference.linear import exact, wide
from spu.ops.sink import sinks_of

__all__ = [
    "LARGEST_TRITON_ROW",
    "fused_layer_norm",
    "fused_rms_norm",
    "layer_norm",
    "rms_norm",
    "torch_layer_norm",
    "torch_rms_norm",
]

LARGEST_TRITON_ROW = 16384  # elements: a program of the Triton kernels keeps a row in its registers

Pair = tuple[Tensor, Tensor]


class _Form(NamedTuple):
    """How a norm is computed: ``offset`` and ``rounded`` are RMSNorm's alone."""

    layer: bool
    eps: float
    offset: float
    rounded: bool
    backend: str


def _computed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, form: _Form
) -> tuple[Tensor, ...]:
    """Return (y, statistics of the rows, x + residual)."""
    with BelowAutograd():
        if form.layer:
            return schema.overload("layer_norm", form.backend)(x, residual, weight, bias, form.eps)  # type: ignore[no-any-return]
        options = form.eps, form.offset, form.rounded
        return schema.overload("rms_norm", form.backend)(x, residual, weight, *options)  # type: ignore[no-any-return]


def _normed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, form: _Form
) -> tuple[Tensor, Tensor | None]:
    """Return (y, x + residual or None), with a node of the graph where there is one."""
    if torch.is_grad_enabled():
        return _Norm.apply(x, weight, bias, residual, form)  # type: ignore[no-any-return]
    y, *_, total = _computed(x, weight, bias, residual, form)
    return y, None if residual is None else total


class _Norm(Function):
    """``apply(x, weight, bias, residual, form)`` -> (y, x + residual or None)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, form: _Form
    ) -> tuple[Tensor, Tensor | None]:
        y, *statistics, total = _computed(x, weight, bias, residual, form)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else total, weight, *statistics)
        ctx.form = form
        ctx.parameters = [t if t is not None and t.requires_grad and t.is_leaf else None for t in (weight, bias)]
        return y, None if residual is None else total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dy is None:
            return dsum, None, None, dsum, None
        refuse_derivatives_of_backward("layer_norm" if ctx.form.layer else "rms_norm", dy)
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        dx, dw, db = _gradients(ctx, dy, dsum, needs_x or needs_residual, needs_weight, needs_bias)
        vectors: list[Tensor | None] = []
        sinks = sinks_of(ctx, ctx.parameters)
        for sink, needed, grad in zip(sinks, (needs_weight, needs_bias), (dw, db), strict=True):
            if sink is not None:
                sink.summed(grad, ctx.form.backend)
            vectors.append(grad if needed and sink is None else None)
        return dx if needs_x else None, *vectors, dx if needs_residual else None, None


def _gradients(ctx: Any, dy: Tensor, dsum: Tensor | None, *needs: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dw and db; what is not needed is empty."""
    x, weight, *statistics = ctx.saved_tensors
    form = ctx.form
    if form.layer:
        return schema.overload("layer_norm_backward", form.backend)(dy, dsum, x, weight, *statistics, *needs)  # type: ignore[no-any-return]
    options = form.offset, form.rounded
    dx, dw = schema.overload("rms_norm_backward", form.backend)(dy, dsum, x, weight, *statistics, *options, *needs[:2])
    return dx, dw, dw


def _check(op: str, x: Tensor, residual: Tensor | None, vectors: dict[str, Tensor | None]) -> None:
    if x.dim() < 1 or x.dtype not in DTYPES["reference"]:
        raise TypeError(f"{op}: x is {x.dtype} {tuple(x.shape)}: give float16, bfloat16 or float32 of shape [..., C]")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"{op}: residual is {residual.dtype} {tuple(residual.shape)} on {residual.device} but x is {x.dtype} "
            f"{tuple(x.shape)} on {x.device}: they must be alike"
        )
    given = {name: tensor for name, tensor in vectors.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.shape != x.shape[-1:] or tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} is {tuple(tensor.shape)} on {tensor.device}, but x {tuple(x.shape)} on {x.device} needs "
                f"({x.shape[-1]},) there"
            )
        if tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{op}: {name} is {tensor.dtype} but x is {x.dtype}: give it that dtype, or float32")
    if len({tensor.dtype for tensor in given.values()}) > 1:
        raise TypeError(f"{op}: weight is {given['weight'].dtype} but bias is {given['bias'].dtype}: convert one")


def _backend(x: Tensor, *others: Tensor | None) -> str | None:
    """Return the backend that serves a norm of these tensors; None: torch's own ops."""
    if not takes(x, *others) or torch.compiler.is_compiling():
        return None
    backend = choose_backend(x)
    return None if backend == "triton" and x.dim() and x.shape[-1] > LARGEST_TRITON_ROW else backend


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    rounded: bool = False,
) -> Tensor | Pair:
    """Compute x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension.

    Args:
        x: [..., C]; fp16, bf16, fp32 (fp64 on the reference backend).
        weight: [C], of the same dtype or fp32; None: 1.
        eps: default: torch's, 2^-23 (fp64: 2^-52).
        residual: like x; x + residual is normalised.
        offset: added to the weight (Gemma: 1).
        rounded: round to the dtype of x before the weight multiplies, as transformers' Llama does; ``F.rms_norm`` does
            not.

    Returns:
        y [..., C], contiguous, in the dtype of x; with a residual (y, x + residual). Differentiable once in all
        tensors; inside a loss scale's scope the parameters' sinks take their gradients, summed in fp32. Torch's own ops
        serve what ``linear_act`` leaves to them, and ``torch.compile``, which fuses them itself.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that differ or are not supported.
    """
    _check("rms_norm", x, residual, {"weight": weight})
    backend = _backend(x, residual, weight)
    if backend is None:
        return torch_rms_norm(x, weight, _eps(x) if eps is None else eps, residual, offset, rounded)
    form = _Form(False, _eps(x) if eps is None else eps, offset, rounded, backend)
    y, total = _normed(x, weight, None, residual, form)
    return y if total is None else (y, total)


def fused_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float | None, backend: str, offset: float = 0.0, rounded: bool = False
) -> Tensor:
    """Compute ``rms_norm`` of tensors that a backend's kernel is known to take."""
    form = _Form(False, _eps(x) if eps is None else eps, offset, rounded, backend)
    return _normed(x, weight, None, None, form)[0]


def fused_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str) -> Tensor:
    """Compute ``layer_norm`` of tensors that a backend's kernel is known to take."""
    return _normed(x, weight, bias, None, _Form(True, eps, 0.0, False, backend))[0]


def _eps(x: Tensor) -> float:
    return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | Pair:
    """Compute (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last dimension.

    Args, results and errors are those of ``rms_norm``; ``bias`` is [C] of the dtype of ``weight``, or None.
    """
    _check("layer_norm", x, residual, {"weight": weight, "bias": bias})
    backend = _backend(x, residual, weight, bias)
    if backend is None:
        return torch_layer_norm(x, weight, bias, eps, residual)
    y, total = _normed(x, weight, bias, residual, _Form(True, eps, 0.0, False, backend))
    return y if total is None else (y, total)


@exact
def torch_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, offset: float, rounded: bool
) -> Tensor | Pair:
    """Compute ``rms_norm`` by torch's own ops."""
    v = x if residual is None else x + residual
    normed = wide(v) * torch.rsqrt(wide(v).pow(2).mean(-1, keepdim=True) + eps)
    if rounded:
        normed = wide(normed.to(x.dtype))
    if weight is not None:
        factor = weight.to(normed.dtype)
        normed = normed * (offset + factor if offset else factor)
    y = normed.to(x.dtype)
    return y if residual is None else (y, v)


@exact
def torch_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None
) -> Tensor | Pair:
    """Compute ``layer_norm`` by torch's own ops."""
    v = x if residual is None else x + residual
    values = wide(v)
    w, b = (None if t is None else t.to(values.dtype) for t in (weight, bias))
    y = F.layer_norm(values, x.shape[-1:], w, b, eps).to(x.dtype)
    return y if residual is None else (y, v)
