"""``linear_act``: act(x @ weight.T + bias) with a backward that knows the loss scale.

Forward and backward follow one recipe on every backend (dy is the scaled gradient):

    dz = dy * act'(z)                     fp32, rounded once to the storage dtype; the rest uses the rounded value
    dx = dz @ weight                      storage dtype, still scaled
    main_grad (+)= inv_scale * dz.T @ x   fp32, by the parameter's sink, inside a scope; else a plain gradient
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spu.common.dtypes import HALVES
from spu.common.torch_private import any_autocast
from spu.ops import schema
from spu.ops.autograd import Eager, FusedOp, without_gradient
from spu.ops.convert import narrowed
from spu.ops.dispatch import DTYPES, choose_backend, has_kernel
from spu.ops.in_place import weight_sinks_of
from spu.ops.plain import takes
from spu.ops.reference.linear import ACTIVATIONS, autocast_enabled, exact, torch_activation
from spu.ops.sink import GradSink, MainGrad

__all__ = [
    "bias_gradient",
    "check_activation",
    "check_operands",
    "compute_dtype",
    "fused_linear_act",
    "linear_act",
    "linear_db_",
    "linear_dw_",
    "linear_dw_db_",
    "linear_dw_each_",
    "torch_linear_act",
    "weight_gradient",
    "weight_gradients",
]

_NEEDS_PREACT = ("gelu", "gelu_tanh", "silu")
_FLOATS = DTYPES["reference"]


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], given: Sequence[Any]) -> None:
    """Keep the inputs and outputs of ``spu::linear`` that the backward needs, and no more."""
    x, weight, _, activation, keep_preact = inputs
    if activation in _NEEDS_PREACT and not keep_preact:
        raise ValueError(f"spu::linear needs keep_preact=True to be differentiated with activation {activation!r}")
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    saved = outputs[0] if activation == "relu" else outputs[1] if keep_preact else None
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, saved)
    # The parameters themselves: what save_for_backward gives back is another object under saved-tensor hooks
    # (activation checkpointing), and a sink belongs to the object.
    _, own_weight, own_bias = given
    ctx.parameters = (
        own_weight if needs_weight and own_weight.is_leaf else None,
        own_bias if needs_bias and own_bias is not None and own_bias.is_leaf else None,
    )
    ctx.activation = activation


def _gradients(ctx: Any, dy: Tensor, backend: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias."""
    x, weight, saved = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    weight_sink, bias_sink = weight_sinks_of(ctx, ctx.parameters, backend)
    dz, dx = _input_gradients(dy, saved, weight if needs_x else None, ctx.activation, backend)
    transposed = bool(ctx.how) and ctx.how[1]  # the weight is [K, N]
    if weight_sink is not None and bias_sink is not None and not transposed:
        weight_sink.linear_weight_and_bias(dz, x, bias_sink, backend)
        return dx, None, None
    dw = weight_gradient(weight_sink, needs_weight, dz, x, transposed, backend, ctx.dtypes and ctx.dtypes[1])
    return dx, dw, bias_gradient(bias_sink, needs_bias, dz, backend)


def weight_gradient(
    sink: GradSink | None,
    needed: bool,
    dz: Tensor,
    x: Tensor,
    transposed: bool,
    backend: str,
    dtype: torch.dtype | None = None,
) -> Tensor | None:
    """Compute dz.T @ x, or x.T @ dz for a ``transposed`` weight [K, N]: give it to the sink, or return it, or do
    nothing if it is not needed.

    Args:
        dtype: the parameter's. An fp32 one gets the fp32 sum, which is not rounded to 16 bits and widened again; on the
            reference backend it is, as in plain torch.
    """
    left, right = (x, dz) if transposed else (dz, x)
    if sink is not None:
        sink.linear_weight(left, right, backend)
        return None
    if not needed:
        return None
    if not _stays_wide(dz, backend, dtype):
        return schema.overload("linear_dw", backend)(left, right)  # type: ignore[no-any-return]
    return _wide_gradients([left], right, backend)[0]


def weight_gradients(
    sinks: Sequence[GradSink | None],
    needed: Sequence[bool],
    dzs: Sequence[Tensor],
    x: Tensor,
    backend: str,
    dtypes: Sequence[torch.dtype | None],
) -> list[Tensor | None]:
    """Do ``weight_gradient`` for several weights [N, K] of products that share x, by one op where all are alike."""
    first, *others = sinks
    if first is not None and None not in others:
        first.linear_weights(others, dzs, x, backend)  # type: ignore[arg-type]
        return [None] * len(sinks)
    if all(needed) and not any(sinks) and all(_stays_wide(dzs[0], backend, dtype) for dtype in dtypes):
        return list(_wide_gradients(dzs, x, backend))
    each = zip(sinks, needed, dzs, dtypes, strict=True)
    return [weight_gradient(sink, need, dz, x, False, backend, dtype) for sink, need, dz, dtype in each]


def _stays_wide(dz: Tensor, backend: str, dtype: torch.dtype | None) -> bool:
    """Tell whether the gradient of a parameter of ``dtype`` is the fp32 sum itself."""
    return backend != "reference" and dtype == torch.float32 and dz.dtype in HALVES and dz.numel() > 0


def _wide_gradients(dzs: Sequence[Tensor], x: Tensor, backend: str) -> list[Tensor]:
    one = torch.ones(1, device=x.device, dtype=torch.float32)
    dws = [torch.empty(dz.shape[-1], x.shape[-1], device=x.device, dtype=torch.float32) for dz in dzs]
    linear_dw_each_(dzs, x, dws, MainGrad(dws[0], one, torch.zeros_like(one), False), backend=backend)
    return dws


def bias_gradient(sink: GradSink | None, needed: bool, dz: Tensor, backend: str) -> Tensor | None:
    """Compute the sum over rows of dz: give it to the sink, or return it, or do nothing if it is not needed."""
    if sink is not None:
        sink.linear_bias(dz, backend)
        return None
    return schema.overload("linear_db", backend)(dz) if needed else None


def _input_gradients(
    dy: Tensor, saved: Tensor | None, weight: Tensor | None, activation: str, backend: str
) -> tuple[Tensor, Tensor | None]:
    """Return (dz, dx), from one op where the backend has a kernel for both; no dx without a weight."""
    if activation == "none":
        dz = dy
    elif weight is not None and has_kernel("linear_dz_dx", backend):
        return schema.overload("linear_dz_dx", backend)(dy, saved, weight, activation)  # type: ignore[no-any-return]
    else:
        dz = schema.overload("linear_dz", backend)(dy, saved, activation)
    return dz, None if weight is None else schema.overload("linear_dx", backend)(dz, weight)


def _operands(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None,
    transposed: bool,
    to: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return x [..., K], weight [N, K] and bias [N] in the dtype of the computation (None: in their own)."""
    if dtype is not None:
        x, weight, bias = to(x, dtype), to(weight, dtype), None if bias is None else to(bias, dtype)
    return x, weight.t() if transposed else weight, bias


_LINEAR = FusedOp("linear", "linear_act", 3, _save, _gradients, partial(_operands, to=narrowed))


def check_activation(activation: str) -> None:
    """Raise ValueError for an unknown activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: use one of {', '.join(map(repr, ACTIVATIONS))}")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> None:
    """Check the arguments and return ``weight`` as [N, K]. ``dtype``: the dtype that all operands will be converted to,
    or None.
    """
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
    check_operands("linear_act", x, dtype, ("weight", weight), ("bias", bias))


def check_operands(op: str, x: Tensor, dtype: torch.dtype | None, *others: tuple[str, Tensor | None]) -> None:
    """Raise TypeError if spu does not support the dtype of ``x``, or the ``dtype`` that all operands will be converted
    to (None: not, and the others must have that of ``x``), and ValueError if one of the others is on another device.
    """
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(f"{op}: dtype is {dtype}: use float16, bfloat16 or float32")
    if not x.dtype.is_floating_point or (dtype is None and x.dtype not in _FLOATS):
        raise TypeError(f"{op}: x is {x.dtype}: convert it to float16, bfloat16 or float32")
    device = x.device
    for name, tensor in others:
        if tensor is None:
            continue
        if dtype is None and tensor.dtype != x.dtype:
            raise TypeError(
                f"{op}: x is {x.dtype} but {name} is {tensor.dtype}: convert one of them with .to(), or use "
                "torch.autocast"
            )
        if tensor.device != device:
            raise ValueError(f"{op}: x is on {device} but {name} is on {tensor.device}: move one with .to()")


def compute_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype that a fused op converts its operands to, None for no conversion. It is the one asked for, else
    torch's choice for a linear layer under autocast: every floating operand but fp64 gets autocast's dtype.
    """
    if dtype is not None or not any_autocast() or x.dtype == torch.float64:
        return dtype
    device_type = x.device.type  # a new string: 10% of a small call, so not before
    return torch.get_autocast_dtype(device_type) if autocast_enabled(device_type) else None


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    *,
    dtype: torch.dtype | None = None,
    transposed: bool = False,
) -> Tensor:
    """Compute y = act(x @ weight.T + bias), accumulated in fp32 and rounded once.

    Args:
        x: [..., K] of any strides; fp16, bf16, fp32 (fp64 on the reference backend).
        weight: [N, K], same dtype and device.
        bias: [N] or None.
        activation: "none", "relu", "gelu" (exact), "gelu_tanh" or "silu".
        dtype: operands are converted to it first; default: to autocast's inside ``torch.autocast``, else not at all.
        transposed: the weight is [K, N] (GPT-2's Conv1D).

    Returns:
        y [..., N], contiguous, in the dtype of the computation. Differentiable once in x, weight and bias, whose
        gradients have their own dtypes; works under ``torch.compile``, where (as in any backward outside a scope)
        weight and bias get ordinary gradients. Torch's own ops serve tensor subclasses, sparse and nested tensors,
        ``torch.func`` transforms, forward-mode derivatives, ``torch.jit.trace`` and ``torch.export``.

    Raises:
        ValueError: shapes or devices that do not fit, or an unknown activation.
        TypeError: dtypes that differ or are not supported.
    """
    check_activation(activation)
    if takes(x, weight, bias):
        return fused_linear_act(x, weight, bias, activation, dtype, transposed)
    return torch_linear_act(x, weight, bias, activation, compute_dtype(x, dtype), transposed)


def fused_linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype | None, transposed: bool = False
) -> Tensor:
    """Compute ``linear_act`` of tensors that the op takes (``plain.takes``)."""
    dtype = compute_dtype(x, dtype)
    _check(x, weight.t() if transposed else weight, bias, dtype)
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    shape: tuple[int, ...] = ()
    if x.is_cuda:
        shape = (x.shape[:-1].numel(), *(weight.shape[::-1] if transposed else weight.shape))
    backend = choose_backend(x, dtype, op="linear", shape=shape)
    keep_preact = needs_grad and activation in _NEEDS_PREACT
    if needs_grad and not torch.compiler.is_compiling():
        how = dtype, transposed
        return Eager.apply(x, weight, bias, _LINEAR, backend, (activation, keep_preact), how)
    operands = _operands(x, weight, bias, dtype, transposed)
    return without_gradient("linear", backend, *operands, activation, keep_preact)[0]  # type: ignore[no-any-return]


@exact
def torch_linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype | None, transposed: bool = False
) -> Tensor:
    """Compute the same by torch's own ops, in ``dtype`` (None: the operands' own). Torch rounds after each op."""
    x, weight, bias = _operands(x, weight, bias, dtype, transposed)
    return torch_activation(F.linear(x, weight, bias), activation)


def linear_dw_(dz: Tensor, x: Tensor, into: MainGrad, *, backend: str | None = None) -> None:
    """Compute main_grad (+)= inv_scale * dz.T @ x: fp32 [N, K], contiguous. For gradient sinks."""
    schema.overload("linear_dw_", backend or choose_backend(dz))(dz, x, *into)


def linear_dw_each_(
    dzs: Sequence[Tensor], x: Tensor, main_grads: Sequence[Tensor], how: MainGrad, *, backend: str
) -> None:
    """Compute ``linear_dw_`` of products that share x into each of ``main_grads``, all as ``how`` says."""
    if len(dzs) == 1:
        schema.overload("linear_dw_", backend)(dzs[0], x, main_grads[0], *how[1:])
    else:
        schema.overload("linear_dw_each_", backend)(dzs, x, main_grads, *how[1:])


def linear_dw_db_(dz: Tensor, x: Tensor, into: MainGrad, bias_grad: Tensor, *, backend: str | None = None) -> None:
    """Compute ``linear_dw_`` into main_grad and ``linear_db_`` into ``bias_grad``, by one kernel where the backend has
    it.
    """
    main_grad, *how = into
    schema.overload("linear_dw_db_", backend or choose_backend(dz))(dz, x, main_grad, bias_grad, *how)


def linear_db_(dz: Tensor, into: MainGrad, *, backend: str | None = None) -> None:
    """Compute main_grad (+)= inv_scale * sum over rows of dz: fp32 [N]. For gradient sinks."""
    schema.overload("linear_db_", backend or choose_backend(dz))(dz, *into)
