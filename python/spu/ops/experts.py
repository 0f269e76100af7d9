"""A mixture of gated experts as one node of the graph: each token's sum over its experts of weight * expert(token).

    xs = rows of x, those of one expert after those of another
    y = (act(xs @ w_gate.T) * (xs @ w_up.T)) @ w_down.T           each expert's rows by its weights, rounded once
    out_t = sum over k of scores_tk * y_tk                        in fp32, rounded once

In the backward, where ys of a token are its experts' and dout is scaled:

    dscores_tk = dout_t . y_tk                                    in fp32
    dy_tk = scores_tk * dout_t                                    rounded once; from it as in ``gated_mlp``
    dx_t = sum over k of dxs_tk                                   in fp32, rounded once
    weights: each expert's rows' products                         by the parameters' sinks, inside a scope; else plain

What is kept for it: x, y, gate and up. The rows of x are gathered again. Every shape follows from the number of tokens,
whatever the router has chosen, so that layers can be planned without values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spu.common.torch_private import BelowAutograd
from spu.ops import schema
from spu.ops.autograd import Function
from spu.ops.convert import narrowed
from spu.ops.dispatch import choose_backend
from spu.ops.in_place import weight_sinks_of
from spu.ops.plain import refuse_derivatives_of_backward
from spu.ops.sink import GradSink, MainGrad

__all__ = ["ExpertsForm", "experts_dw_", "gated_experts"]


class ExpertsForm(NamedTuple):
    """How experts are computed: ``dtype`` is the computation's."""

    dtype: torch.dtype
    backend: str
    activation: str


class _Routed(NamedTuple):
    """Where tokens' rows are, sorted by expert.

    Attributes:
        uses: [S] places in the flat scores, sorted.
        tokens: [S, 1] the token of each sorted row.
        places: [T, K] the sorted row of each use.
        ends: [E] where each expert's rows end.
    """

    uses: Tensor
    tokens: Tensor
    places: Tensor
    ends: Tensor


def _routed(ids: Tensor, experts: int, backend: str) -> _Routed:
    uses, places, ends = schema.overload("experts_order", backend)(ids, experts)
    return _Routed(uses, torch.div(uses, ids.shape[1], rounding_mode="floor")[:, None], places, ends)


def _forward(
    x: Tensor, scores: Tensor, weights: Sequence[Tensor], routed: _Routed, keep: bool, form: ExpertsForm
) -> tuple[Tensor, ...]:
    """Return (out in the dtype of x, y, gate, up); weights are of the computation's dtype."""
    rows_sum = schema.overload("rows_sum", form.backend)
    xs = rows_sum(x, routed.tokens, None, form.dtype)
    y, gate, up = schema.overload("experts_mlp", form.backend)(xs, routed.ends, *weights, form.activation, keep)
    del xs
    return rows_sum(y, routed.places, scores.to(torch.float32), x.dtype), y, gate, up


class _Experts(Function):
    """``apply(x, scores, w_gate_up, w_down, ids, form)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scores: Tensor, *rest: Any) -> Tensor:
        *given, ids, form = rest
        ctx.set_materialize_grads(False)
        needs_x, needs_scores, needs_up, needs_down = ctx.needs_input_grad[:4]
        leaves = zip(given, (needs_up, needs_down), strict=True)
        ctx.parameters = [w if needed and w.is_leaf else None for w, needed in leaves]
        ctx.form, ctx.dtypes = form, [t.dtype for t in (x, scores, *given)]
        with BelowAutograd():
            weights = [narrowed(w, form.dtype) for w in given]
            routed = _routed(ids, given[0].shape[0], form.backend)
            out, y, gate, up = _forward(x, scores, weights, routed, True, form)
            through = needs_x or needs_up
            ctx.save_for_backward(
                x if needs_up else None,
                scores,
                weights[0] if needs_x else None,
                weights[1] if through else None,
                y if needs_scores else None,
                *((gate, up) if through or needs_down else (None, None)),
                *routed,
            )
            return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dout is None:
            return (None,) * 6
        refuse_derivatives_of_backward("experts", dout)
        form, needs, dtypes = ctx.form, ctx.needs_input_grad, ctx.dtypes
        x, scores, w_gate_up, w_down, y, gate, up, *places = ctx.saved_tensors
        routed = _Routed(*places)
        dscores = None
        if needs[1]:
            dscores = schema.overload("rows_dot", form.backend)(dout, y, routed.places).to(dtypes[1])
        if gate is None:
            return None, dscores, None, None, None, None
        sinks = weight_sinks_of(ctx, ctx.parameters, form.backend)
        rows_sum = schema.overload("rows_sum", form.backend)
        of_rows = scores.to(torch.float32).flatten()[routed.uses][:, None]
        dy = rows_sum(dout, routed.tokens, of_rows, form.dtype)
        if w_down is None:  # only the down projections learn: gate stands in, and of the result only h is used
            dgate, dup, h = schema.overload("gated_dz", form.backend)(gate, gate, up, form.activation)
        else:
            dgate, dup, h = schema.overload("experts_dh", form.backend)(
                dy, routed.ends, w_down, gate, up, form.activation
            )
        d_down = _weight_gradient(sinks[1], needs[3], [dy], h, routed.ends, (dtypes[3], form.backend))
        del dy, h
        dx = d_up = None
        if needs[0]:
            dxs = schema.overload("experts_dx", form.backend)(dgate, dup, routed.ends, w_gate_up)
            dx = rows_sum(dxs, routed.places, None, dtypes[0])
            del dxs
        if needs[2]:
            xs = rows_sum(x, routed.tokens, None, form.dtype)
            d_up = _weight_gradient(sinks[0], True, [dgate, dup], xs, routed.ends, (dtypes[2], form.backend))
        return dx, dscores, d_up, d_down, None, None


def _weight_gradient(
    sink: GradSink | None, needed: bool, dzs: list[Tensor], x: Tensor, ends: Tensor, how: tuple[torch.dtype, str]
) -> Tensor | None:
    """Compute the gradients of all experts' weights: give them to the sink, or return them in the parameter's dtype, or
    do nothing if they are not needed.
    """
    dtype, backend = how
    if sink is not None:
        sink.experts_weight(dzs, x, ends, backend)
        return None
    if not needed:
        return None
    if dtype == x.dtype:
        return schema.overload("experts_dw", backend)(dzs, x, ends)  # type: ignore[no-any-return]
    one = torch.ones(1, device=x.device, dtype=torch.float32)
    columns = sum(dz.shape[1] for dz in dzs)
    wide = torch.empty(ends.shape[0], columns, x.shape[1], device=x.device, dtype=torch.float32)
    experts_dw_(dzs, x, ends, MainGrad(wide, one, torch.zeros_like(one), False), backend=backend)
    return wide.to(dtype)


def experts_dw_(dzs: Sequence[Tensor], x: Tensor, ends: Tensor, into: MainGrad, *, backend: str | None = None) -> None:
    """Compute main_grad[e] (+)= inv_scale * [dzs].T @ x of each expert's rows: fp32 [E, N, K], contiguous. For gradient
    sinks.
    """
    schema.overload("experts_dw_", backend or choose_backend(x))(dzs, x, ends, *into)


def gated_experts(
    x: Tensor, ids: Tensor, scores: Tensor, w_gate_up: Tensor, w_down: Tensor, form: ExpertsForm
) -> Tensor:
    """Compute the sum over its experts of each token, for tensors that the ops take (``plain.takes``), in eager code.

    Args:
        x: [T, C]; fp16, bf16 or fp32.
        ids: [T, K] int64, in [0, E); E itself is nobody, whose part is zero.
        scores: [T, K], floating-point.
        w_gate_up: [E, 2 N, C], an expert's gate above its up matrix; w_down: [E, C, N]; floating-point, converted to
            ``form.dtype``.

    Returns:
        out [T, C] in the dtype of x. Differentiable once in x, scores and the weights.

    Raises:
        ValueError: an id that is no expert's.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, scores, w_gate_up, w_down)):
        return _Experts.apply(x, scores, w_gate_up, w_down, ids, form)  # type: ignore[no-any-return]
    weights = [narrowed(w, form.dtype) for w in (w_gate_up, w_down)]
    routed = _routed(ids, w_gate_up.shape[0], form.backend)
    return _forward(x, scores, weights, routed, False, form)[0]
