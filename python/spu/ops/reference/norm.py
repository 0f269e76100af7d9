"""The definition of RMSNorm, LayerNorm, rotary positions and an embedding's gradient, in plain torch.

Statistics and everything between are fp32 (fp64 for fp64); results are rounded once, to the dtype of x. fp32 forwards
have the bits of the modules that they stand for. RMSNorm: Zhang and Sennrich, arXiv:1910.07467; LayerNorm: Ba et al.,
arXiv:1607.06450; rotary positions: Su et al., arXiv:2104.09864.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spu.ops.reference.linear import into_main_grad, rows_of, wide

__all__ = [
    "IMPLEMENTATIONS",
    "embedding_dw_",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "rotated",
]


def _added(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what is normalised, and the sum to keep: empty without a residual."""
    if residual is None:
        return x, x.new_empty(0)
    total = (x + residual).contiguous()
    return total, total


def _weighted(normed: Tensor, weight: Tensor | None, offset: float) -> Tensor:
    if weight is None:
        return normed
    factor = weight.to(normed.dtype)
    return normed * (offset + factor if offset else factor)


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y = v / sqrt(mean(v^2) + eps) * (weight + offset) of rows v = x + residual.

    Args:
        x, residual: [..., C], of one dtype.
        weight: [C], of that dtype or fp32.
        rounded: round the normalised row to the dtype of x before the weight multiplies it.

    Returns:
        (y [..., C], 1 / sqrt(..) fp32 [rows], the sum v [..., C] or empty)
    """
    v, total = _added(x, residual)
    values = wide(v)
    rstd = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    normed = values * rstd
    if rounded:
        normed = wide(normed.to(x.dtype))
    return _weighted(normed, weight, offset).to(x.dtype).contiguous(), rstd.reshape(-1), total


def rms_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    rounded: bool,
    needs_dx: bool,
    needs_dw: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of what was normalised, x, with ``dsum`` added, and that of the weight in fp32, both scaled
    as dy is; empty where not wanted.

    With n = x * rstd and g = dy * weight: dx = rstd * (g - n * mean(g n)), dw = sum over rows of dy * n.
    """
    d, by_row = wide(dy), rstd.view(*x.shape[:-1], 1)
    normed = wide(x) * by_row
    factor = wide(normed.to(x.dtype)) if rounded else normed
    dw = rows_of(d * factor).sum(0) if needs_dw else rstd.new_empty(0)
    return _input_gradient(_weighted(d, weight, offset), dsum, normed, by_row, x, needs_dx), dw


def _input_gradient(g: Tensor, dsum: Tensor | None, normed: Tensor, rstd: Tensor, x: Tensor, needed: bool) -> Tensor:
    if not needed:
        return x.new_empty(0)
    dx = (g - normed * (g * normed).mean(-1, keepdim=True)) * rstd
    if dsum is not None:
        dx = dx + wide(dsum)
    return dx.to(x.dtype).contiguous()


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute y = (v - mean(v)) / sqrt(variance(v) + eps) * weight + bias of rows v = x + residual.

    Returns:
        (y [..., C], mean fp32 [rows], 1 / sqrt(..) fp32 [rows], the sum v [..., C] or empty)
    """
    v, total = _added(x, residual)
    values = wide(v)
    w, b = (None if vector is None else vector.to(values.dtype) for vector in (weight, bias))
    y, mean, rstd = torch.native_layer_norm(values, x.shape[-1:], w, b, eps)
    return y.to(x.dtype).contiguous(), mean.reshape(-1), rstd.reshape(-1), total


def layer_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs_dx: bool,
    needs_dw: bool,
    needs_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``rms_norm_backward`` returns, and the gradient of the bias in fp32.

    With n = (x - mean) * rstd and g = dy * weight: dx = rstd * (g - mean(g) - n * mean(g n)).
    """
    d, by_row = wide(dy), rstd.view(*x.shape[:-1], 1)
    normed = (wide(x) - mean.view_as(by_row)) * by_row
    dw = rows_of(d * normed).sum(0) if needs_dw else rstd.new_empty(0)
    db = rows_of(d).sum(0) if needs_db else rstd.new_empty(0)
    g = _weighted(d, weight, 0.0)
    return _input_gradient(g - g.mean(-1, keepdim=True), dsum, normed, by_row, x, needs_dx), dw, db


def embedding_dw_(
    dy: Tensor, ids: Tensor, padding_idx: int, main_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, accumulate: bool
) -> None:
    """Compute main_grad [V, C] (+)= inv_scale * the sum, for each entry, of the rows of dy [..., C] with its id, in
    fp32 and in their order; those with ``padding_idx`` are left out (-1: none).
    """
    value = torch.ops.aten.embedding_dense_backward(dy.float(), ids, main_grad.shape[0], padding_idx, False)
    into_main_grad(value, main_grad, inv_scale, found_inf, accumulate)


def rotated(x: Tensor, interleaved: bool) -> Tensor:
    """Return (-x2, x1) for the pairs (x1, x2) of the last dimension: its two halves, or its neighbours."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    values = wide(x)
    other = -rotated(values * sin, interleaved) if inverse else rotated(values, interleaved) * sin
    out = torch.empty_like(x)  # the layout of x, where it has no gaps
    return out.copy_(values * cos + other)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    """Compute x * cos + rotated(x) * sin for x = q and k; ``inverse``: the transpose of that, which takes gradients
    back.

    Args:
        q: [batch, heads, tokens, head_dim]; k: the same with heads of its own.
        cos, sin: [batch or 1, tokens, head_dim], of the same dtype or fp32.
    """
    by_head = wide(cos).unsqueeze(1), wide(sin).unsqueeze(1)
    turned_q, turned_k = (_turned(x, *by_head, interleaved, inverse) for x in (q, k))
    return turned_q, turned_k


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "rms_norm_backward": rms_norm_backward,
    "layer_norm": layer_norm,
    "layer_norm_backward": layer_norm_backward,
    "embedding_dw_": embedding_dw_,
    "rotary": rotary,
}
