"""The two halves of a decoder layer, each one node of the graph: x + attention(norm(x)) and x + mlp(norm(x)).

Both are made of this library's smaller ops, in one dtype of computation, beside a residual x that may be wider. Against
the ops one by one they save what lies between: nodes, conversions at each op's edge, additions of gradients.

    attention    n = norm(x); q, k, v = n @ w.T; q, k turned; a = softmax(scale q k.T) v; y = x + a @ wo.T
    gated        n = norm(x); y = x + (act(n @ w_gate.T) * (n @ w_up.T)) @ w_down.T

n, q, k, v, a and the sum's second operand are each rounded once to the dtype of the computation; angles, statistics,
scores and sums are fp32. In the backward dy joins what comes through the norm before that is rounded. Weights go as
everywhere: to their parameters' sinks, inside a scope.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spu.common.torch_private import BelowAutograd
from spu.ops import schema
from spu.ops.autograd import Function
from spu.ops.convert import narrowed, stacked
from spu.ops.documents import Lengths, attention_apart, attention_apart_backward
from spu.ops.gated import gated_gradients
from spu.ops.in_place import weight_sinks_of
from spu.ops.linear import bias_gradient, weight_gradients
from spu.ops.plain import refuse_derivatives_of_backward
from spu.ops.sink import GradSink

__all__ = ["AttentionForm", "AttentionWeights", "GatedForm", "NormForm", "attention_half", "gated_half"]


class NormForm(NamedTuple):
    """The options of ``rms_norm``."""

    eps: float
    offset: float
    rounded: bool


class GatedForm(NamedTuple):
    """How a gated half is computed: ``dtype`` is the computation's."""

    norm: NormForm
    dtype: torch.dtype
    backend: str
    activation: str


class AttentionForm(NamedTuple):
    """How an attention half is computed: causal, ``interleaved`` as in ``rotary``; rows of several documents, or with
    padding, by the ``lengths`` of their documents.
    """

    norm: NormForm
    dtype: torch.dtype
    backend: str
    head_dim: int
    scale: float
    interleaved: bool
    lengths: Lengths | None = None


class AttentionWeights(NamedTuple):
    """The parameters of an attention: weights [out, in], biases [out] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    o_bias: Tensor | None


def _leaves(ctx: Any, given: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return those of an op's tensors whose gradients may go to a sink, None for the others."""
    needs = ctx.needs_input_grad[1:]
    return [t if t is not None and need and t.is_leaf else None for t, need in zip(given, needs, strict=False)]


def _norm(x: Tensor, weight: Tensor, form: GatedForm | AttentionForm) -> tuple[Tensor, Tensor]:
    """Return (the normalised rows in the dtype of the computation, 1 / their root mean squares)."""
    return schema.overload("rms_norm_to", form.backend)(x, weight, *form.norm, form.dtype)  # type: ignore[no-any-return]


def _may_be_added(x: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a product's kernel may add its result to this residual: not to one of the other 16-bit dtype."""
    return x.dtype in (dtype, torch.float32)


def _through_norm(
    ctx: Any, dn: Tensor | None, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, sink: GradSink | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x, with ``dy`` added, and of the norm's weight, which the sink takes if there is one."""
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    if dn is None:
        return dy if needs_x else None, None
    norm, backend = ctx.form.norm, ctx.form.backend
    if x.dtype not in (torch.float32, dn.dtype):
        dn = dn.to(x.dtype)
    backward = schema.overload("rms_norm_backward", backend)
    dx, dw = backward(dn, dy, x, weight, rstd, norm.offset, norm.rounded, needs_x, needs_weight)
    if sink is not None:
        sink.summed(dw, backend)
    return dx if needs_x else None, dw if needs_weight and sink is None else None


class _GatedHalf(Function):
    """``apply(x, norm_weight, w_gate, w_up, w_down, form)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm_weight: Tensor, *rest: Any) -> Tensor:
        *weights, form = rest
        ctx.set_materialize_grads(False)
        ctx.form, ctx.parameters = form, _leaves(ctx, (norm_weight, *weights))
        ctx.dtypes = [w.dtype for w in weights]
        with BelowAutograd():
            normed, rstd = _norm(x, norm_weight, form)
            operands = normed, *(narrowed(w, form.dtype) for w in weights)
            if _may_be_added(x, form.dtype):
                y, gate, up = schema.overload("gated_mlp_add", form.backend)(*operands, form.activation, x)
            else:
                y, gate, up = schema.overload("gated_mlp", form.backend)(*operands, form.activation, True)
                y = x + y
            ctx.save_for_backward(x, norm_weight, rstd, *operands, gate, up)
            return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dy is None:
            return (None,) * 6
        refuse_derivatives_of_backward("gated_mlp", dy)
        x, norm_weight, rstd, *saved = ctx.saved_tensors
        form, needs = ctx.form, ctx.needs_input_grad
        sinks = weight_sinks_of(ctx, ctx.parameters, form.backend)
        needs_normed = needs[0] or needs[1]
        d = narrowed(dy, form.dtype)
        found = gated_gradients(
            d, saved, (needs_normed, *needs[2:5]), sinks[1:], form.activation, form.backend, ctx.dtypes
        )
        dn, *dws = found
        dx, dw = _through_norm(ctx, dn, dy, x, norm_weight, rstd, sinks[0])
        return dx, dw, *dws, None


def gated_half(x: Tensor, norm_weight: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, form: GatedForm) -> Tensor:
    """Compute x + mlp(norm(x)), for tensors that the ops take (``plain.takes``), in eager code.

    Args:
        x: [..., C]; fp16, bf16 or fp32.
        norm_weight: [C] of the dtype of x, or fp32 where the norm is not rounded.
        w_gate, w_up: [N, C]; w_down: [C, N]; floating-point, converted to ``form.dtype``.

    Returns:
        y [..., C] in the dtype of x. Differentiable once in all five.
    """
    return _GatedHalf.apply(x, norm_weight, w_gate, w_up, w_down, form)  # type: ignore[no-any-return]


@dataclass
class _Gradients:
    """The gradients of weights and biases that no sink takes, in the order of ``AttentionWeights``."""

    backend: str
    sinks: Sequence[GradSink | None]
    needs: Sequence[bool]
    dtypes: Sequence[torch.dtype | None]
    found: list[Tensor | None] = field(default_factory=lambda: [None] * 8)

    def add(self, first: int, dzs: Sequence[Tensor], x: Tensor) -> None:
        """Compute those of products of one x, y = x @ weight.T + bias, from the ``first`` weight on."""
        part = slice(first, first + len(dzs))
        of_weights = self.sinks[part], self.needs[part], dzs, x, self.backend, self.dtypes[part]
        self.found[part] = weight_gradients(*of_weights)
        for i, dz in enumerate(dzs, first + 4):
            self.found[i] = bias_gradient(self.sinks[i], self.needs[i], dz, self.backend)


def _projected(normed: Tensor, weights: AttentionWeights, form: AttentionForm) -> tuple[list[Tensor], list[Tensor]]:
    """Return q, k and v [..., out], and their weights in the dtype of the computation: one matrix of all three where
    they have to be converted, so that there is one product.
    """
    ws, biases = weights[:3], weights[4:7]
    given = [bias for bias in biases if bias is not None]
    if len(given) not in (0, 3):
        linear = schema.overload("linear", form.backend)
        kept = [narrowed(w, form.dtype) for w in ws]
        narrow = [None if bias is None else bias.to(form.dtype) for bias in biases]
        return [linear(normed, w, b, "none", False)[0] for w, b in zip(kept, narrow, strict=True)], kept
    if all(w.dtype != form.dtype for w in ws):
        weight = stacked(ws, form.dtype)
        bias = stacked(given, form.dtype) if given else None
        y = schema.overload("linear", form.backend)(normed, weight, bias, "none", False)[0]
        return list(y.split([w.shape[0] for w in ws], -1)), [weight]
    kept = [narrowed(w, form.dtype) for w in ws]
    return schema.overload("linear_each", form.backend)(normed, kept, [bias.to(form.dtype) for bias in given]), kept


def _projected_back(dqkv: Sequence[Tensor], weights: Sequence[Tensor], backend: str) -> Tensor:
    """Return the gradient of what was projected: the sum of three products."""
    linear_dx = schema.overload("linear_dx", backend)
    if len(weights) == 1:
        return linear_dx(torch.cat(tuple(dqkv), -1), weights[0])  # type: ignore[no-any-return]
    (dq, dk, dv), (wq, wk, wv) = dqkv, weights
    both = schema.overload("gated_dx", backend)(dk, dv, wk, wv)
    return schema.overload("linear_add", backend)(dq, wq.t(), None, both)  # type: ignore[no-any-return]


def _turned(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: AttentionForm, *, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Return q and k [batch, tokens, heads, head_dim] turned, or turned back."""
    heads_first = q.transpose(1, 2), k.transpose(1, 2)
    q, k = schema.overload("rotary", form.backend)(*heads_first, cos, sin, form.interleaved, inverse)
    return q.transpose(1, 2), k.transpose(1, 2)


def _attended(q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> tuple[Tensor, list[Tensor]]:
    """Return the attention [batch, tokens, heads, head_dim], and the log-sum-exps that its backward needs."""
    if form.lengths is not None:
        return attention_apart(q, k, v, form.lengths, form.scale, form.backend)
    out, lse = schema.overload("attention", form.backend)(q, k, v, form.scale, True)
    return out, [lse]


def _attended_back(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: list[Tensor], form: AttentionForm
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    if form.lengths is not None:
        return attention_apart_backward(dout, q, k, v, out, sums, form.lengths, form.scale, form.backend)
    backward = schema.overload("attention_backward", form.backend)
    return backward(dout, q, k, v, out, *sums, form.scale, True)  # type: ignore[no-any-return]


class _AttentionHalf(Function):
    """``apply(x, norm_weight, *weights, cos, sin, form)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm_weight: Tensor, *rest: Any) -> Tensor:
        *given, cos, sin, form = rest
        weights = AttentionWeights(*given)
        ctx.set_materialize_grads(False)
        ctx.form, ctx.parameters = form, _leaves(ctx, (norm_weight, *given))
        ctx.dtypes = [None if t is None else t.dtype for t in given]
        backend, heads = form.backend, (*x.shape[:2], -1, form.head_dim)
        with BelowAutograd():
            normed, rstd = _norm(x, norm_weight, form)
            projected, kept = _projected(normed, weights, form)
            q, k, v = (t.view(heads) for t in projected)
            q, k = _turned(q, k, cos, sin, form, inverse=False)
            out, sums = _attended(q, k, v, form)
            wo = narrowed(weights.o, form.dtype)
            bias = None if weights.o_bias is None else weights.o_bias.to(form.dtype)
            ctx.sums = len(sums)
            ctx.save_for_backward(x, norm_weight, rstd, normed, q, k, v, out, cos, sin, wo, *sums, *kept)
            if _may_be_added(x, form.dtype):
                return schema.overload("linear_add", backend)(out.flatten(2), wo, bias, x)  # type: ignore[no-any-return]
            return x + schema.overload("linear", backend)(out.flatten(2), wo, bias, "none", False)[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dy is None:
            return (None,) * 13
        refuse_derivatives_of_backward("attention", dy)
        x, norm_weight, rstd, normed, q, k, v, out, cos, sin, wo, *rest = ctx.saved_tensors
        sums, kept = rest[: ctx.sums], rest[ctx.sums :]
        form, needs, backend = ctx.form, ctx.needs_input_grad, ctx.form.backend
        norm_sink, *sinks = weight_sinks_of(ctx, ctx.parameters, backend)
        d = narrowed(dy, form.dtype)
        grads = _Gradients(backend, sinks, needs[2:10], ctx.dtypes)
        grads.add(3, [d], out.flatten(2))
        dn = None
        if any(needs[i] for i in (0, 1, 2, 3, 4, 6, 7, 8)):
            dout = schema.overload("linear_dx", backend)(d, wo).view(out.shape)
            dq, dk, dv = _attended_back(dout, q, k, v, out, sums, form)
            dqkv = [t.flatten(2) for t in (*_turned(dq, dk, cos, sin, form, inverse=True), dv)]
            grads.add(0, dqkv, normed)
            if needs[0] or needs[1]:
                dn = _projected_back(dqkv, kept, backend)
        dx, dw = _through_norm(ctx, dn, dy, x, norm_weight, rstd, norm_sink)
        return dx, dw, *grads.found, None, None, None


def attention_half(
    x: Tensor, norm_weight: Tensor, weights: AttentionWeights, cos: Tensor, sin: Tensor, form: AttentionForm
) -> Tensor:
    """Compute x + attention(norm(x)), for tensors that the ops take (``plain.takes``), in eager code.

    Args:
        x: [batch, tokens, C]; fp16, bf16 or fp32.
        norm_weight: [C] of the dtype of x, or fp32 where the norm is not rounded.
        weights: of q [heads * head_dim, C], k and v [kv_heads * head_dim, C], o [C, heads * head_dim], floating-point,
            converted to ``form.dtype``.
        cos, sin: [batch or 1, tokens, head_dim], of ``form.dtype`` or fp32, without a gradient.

    Returns:
        y [batch, tokens, C] in the dtype of x. Differentiable once in x and the parameters.
    """
    return _AttentionHalf.apply(x, norm_weight, *weights, cos, sin, form)  # type: ignore[no-any-return]
