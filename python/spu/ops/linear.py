"""``linear_act``: act(x @ weight.T + bias) with a backward that knows the loss scale.

Forward and backward follow one recipe on every backend (dy is the scaled gradient):

    dz = dy * act'(z)                     fp32, rounded once to the storage dtype; the rest uses the rounded value
    dx = dz @ weight                      storage dtype, still scaled
    main_grad (+)= inv_scale * dz.T @ x   fp32, by the parameter's sink, inside a scope; else a plain gradient
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import schema
from .dispatch import DTYPES, choose_backend
from .reference import ACTIVATIONS, autocast_enabled
from .sink import sinks_of

_NEEDS_PREACT = ("gelu", "gelu_tanh", "silu")
_FLOATS = DTYPES["reference"]


def _save(ctx: Any, inputs: tuple[Any, ...], y: Tensor, preact: Tensor) -> None:
    """Keeps for the backward what it will need of ``spu::linear``'s inputs and outputs, and no more."""
    x, weight, bias, activation, keep_preact = inputs
    if activation in _NEEDS_PREACT and not keep_preact:
        raise ValueError(f"spu::linear needs keep_preact=True to be differentiated with activation {activation!r}")
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    saved = y if activation == "relu" else preact if keep_preact else None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, saved)
    # The parameters themselves: what save_for_backward gives back is another object under saved-tensor hooks
    # (activation checkpointing), and a sink belongs to the object.
    ctx.parameters = weight if needs_weight and weight.is_leaf else None, bias if needs_bias and bias.is_leaf else None
    ctx.activation = activation


def _gradients(ctx: Any, dy: Tensor | None, backend: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias; None for those that a sink has taken."""
    if dy is None:
        return None, None, None
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "spu.ops.linear_act has no second derivative: do not pass create_graph=True, or use "
            "torch.nn.functional.linear there"
        )
    x, weight, saved = ctx.saved_tensors
    dz = dy
    if ctx.activation != "none":
        dz = schema.overload("linear_dz", backend)(dy, saved, ctx.activation)
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    weight_sink, bias_sink = sinks_of(ctx.parameters)
    dx = schema.overload("linear_dx", backend)(dz, weight) if needs_x else None
    dw = db = None
    if weight_sink is not None:
        weight_sink.linear_weight(dz, x, backend)
    elif needs_weight:
        dw = schema.overload("linear_dw", backend)(dz, x)
    if bias_sink is not None:
        bias_sink.linear_bias(dz, backend)
    elif needs_bias:
        db = schema.overload("linear_db", backend)(dz)
    return dx, dw, db


def _register(backend: str) -> None:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        _save(ctx, inputs, *output)

    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
        return (*_gradients(ctx, dy, backend), None, None)

    schema.register_autograd("linear", backend, backward, setup)


for _backend in schema.BACKENDS:
    _register(_backend)


class _LinearAct(torch.autograd.Function):
    """The same derivative for eager code: a registered one costs 55us a call, this one 25us (plain torch: 6us)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *inputs, backend = arguments
        with torch._C._AutoDispatchBelowAutograd():
            y, preact = schema.overload("linear", backend)(*inputs)
        _save(ctx, tuple(inputs), y, preact)
        ctx.backend = backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        return (*_gradients(ctx, dy, ctx.backend), None, None, None)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: use one of {', '.join(map(repr, ACTIVATIONS))}")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_act: x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}: x must be [..., in] and weight "
            "[out, in]"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(
            f"linear_act: bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}: it must be "
            f"({weight.shape[0]},)"
        )
    dtype, device = x.dtype, x.device
    if dtype not in _FLOATS:
        raise TypeError(f"linear_act: x is {dtype}: convert it to float16, bfloat16 or float32")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(
                f"linear_act: x is {dtype} but {name} is {tensor.dtype}: convert one of them with .to(), or use "
                "torch.autocast"
            )
        if tensor.device != device:
            raise ValueError(f"linear_act: x is on {device} but {name} is on {tensor.device}: move one with .to()")


def _autocast(
    dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """torch's rule for a linear under autocast: every floating operand but fp64 becomes ``dtype``."""
    if x.dtype == torch.float64:
        return x, weight, bias
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """y = act(x @ weight.T + bias), accumulated in fp32 and rounded once.

    Args:
        x: [..., K] of any strides; fp16, bf16, fp32 (fp64 on the reference backend).
        weight: [N, K], same dtype and device.
        bias: [N] or None.
        activation: "none", "relu", "gelu" (exact), "gelu_tanh" or "silu".

    Returns:
        y [..., N], contiguous. Differentiable once in x, weight and bias; works under ``torch.compile``, where (as
        in any backward outside a scope) weight and bias get ordinary gradients. Under ``torch.autocast`` it computes
        in autocast's dtype, like ``F.linear``. (torch.func transforms do not work: no custom op of torch has them.)

    Raises:
        ValueError: shapes or devices that do not fit, or an unknown activation.
        TypeError: dtypes that differ or are not supported.
    """
    device_type = x.device.type
    if autocast_enabled(device_type):
        x, weight, bias = _autocast(torch.get_autocast_dtype(device_type), x, weight, bias)
    _check(x, weight, bias, activation)
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    backend = choose_backend(x, op="linear", shape=(x.shape[:-1].numel(), *weight.shape))
    keep_preact = needs_grad and activation in _NEEDS_PREACT
    if needs_grad and not torch.compiler.is_compiling():
        return _LinearAct.apply(x, weight, bias, activation, keep_preact, backend)
    return schema.overload("linear", backend)(x, weight, bias, activation, keep_preact)[0]


def linear_dw_(
    dz: Tensor,
    x: Tensor,
    main_grad: Tensor,
    inv_scale: Tensor,
    found_inf: Tensor,
    *,
    accumulate: bool,
    backend: str | None = None,
) -> None:
    """main_grad (+)= inv_scale * dz.T @ x: fp32 [N, K], contiguous; a store without a load unless ``accumulate``.

    ``found_inf`` (fp32 [1]) becomes 1 if any accumulated value is not finite. For gradient sinks.
    """
    op = schema.overload("linear_dw_", backend or choose_backend(dz))
    op(dz, x, main_grad, inv_scale, found_inf, accumulate)


def linear_db_(
    dz: Tensor,
    main_grad: Tensor,
    inv_scale: Tensor,
    found_inf: Tensor,
    *,
    accumulate: bool,
    backend: str | None = None,
) -> None:
    """main_grad (+)= inv_scale * sum over rows of dz: fp32 [N]. For gradient sinks."""
    op = schema.overload("linear_db_", backend or choose_backend(dz))
    op(dz, main_grad, inv_scale, found_inf, accumulate)
