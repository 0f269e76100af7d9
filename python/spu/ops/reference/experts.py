"""The definition of a mixture of gated experts' ops: each expert's are those of a gated MLP, on its rows.

Rows are sorted: those of one expert after those of another, in the order of the experts. ``ends`` [E] int64 says where
each one's end; rows behind the last belong to none, and have zeros in every result. w_gate_up [E, 2 N, C] has an
expert's gate and up matrices one below the other, w_down is [E, C, N].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spu.ops.reference.linear import wide

__all__ = ["IMPLEMENTATIONS"]


def _op(name: str, backend: str) -> Any:
    return getattr(getattr(torch.ops.spu, name), backend)


def _parts(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Return the experts that have rows, and which."""
    first = 0
    for expert, end in enumerate(ends.tolist()):
        if end > first:
            yield expert, slice(first, end)
        first = end


def experts_order(backend: str, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the uses of experts, ids [T, K] int64, by expert; those of one keep their order.

    Returns:
        (order [T K]: the places in flat ids, sorted; places [T, K]: each use's place among the sorted; ends [E])

    Raises:
        ValueError: an id below 0 or above E. E itself is nobody.
    """
    flat = ids.reshape(-1)
    if flat.numel() and not bool(((flat >= 0) & (flat <= experts)).all()):
        raise ValueError(f"experts_order: ids has values that are not in [0, {experts}]")
    in_turn, order = torch.sort(flat, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(flat.numel(), device=flat.device)
    ends = torch.searchsorted(in_turn, torch.arange(experts, device=flat.device), right=True)
    return order, places.view(ids.shape), ends


def experts_mlp(
    backend: str, x: Tensor, ends: Tensor, w_gate_up: Tensor, w_down: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``gated_mlp`` of each expert's rows: x [S, C] -> (y [S, C], gate and up [S, N], empty unless kept)."""
    hidden = w_down.shape[2]
    y = x.new_zeros(x.shape[0], w_down.shape[1])
    gate, up = (x.new_zeros((x.shape[0], hidden) if keep else (0,)) for _ in range(2))
    for e, rows in _parts(ends):
        found = _op("gated_mlp", backend)(x[rows], *w_gate_up[e].split(hidden), w_down[e], activation, keep)
        y[rows] = found[0]
        if keep:
            gate[rows], up[rows] = found[1:]
    return y, gate, up


def experts_dh(
    backend: str, dy: Tensor, ends: Tensor, w_down: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``gated_dh`` of each expert's rows: dy [S, C] -> (dgate, dup, h), [S, N] each."""
    results = tuple(torch.zeros_like(gate) for _ in range(3))
    for e, rows in _parts(ends):
        found = _op("gated_dh", backend)(dy[rows], w_down[e], gate[rows], up[rows], activation)
        for result, one in zip(results, found, strict=True):
            result[rows] = one
    return results  # type: ignore[return-value]


def experts_dx(backend: str, dgate: Tensor, dup: Tensor, ends: Tensor, w_gate_up: Tensor) -> Tensor:
    """Compute ``gated_dx`` of each expert's rows: [S, N] each -> [S, C]."""
    dx = dgate.new_zeros(dgate.shape[0], w_gate_up.shape[2])
    for e, rows in _parts(ends):
        dx[rows] = _op("gated_dx", backend)(dgate[rows], dup[rows], *w_gate_up[e].split(dgate.shape[1]))
    return dx


def experts_dw(backend: str, dzs: Sequence[Tensor], x: Tensor, ends: Tensor) -> Tensor:
    """Compute ``linear_dw`` of each expert's rows: [dzs].T @ x, the dzs' rows one below the other; zeros for an expert
    without rows. [S, N_i] each, x [S, K] -> [E, sum of N_i, K].
    """
    sizes = [dz.shape[1] for dz in dzs]
    dw = x.new_zeros(ends.shape[0], sum(sizes), x.shape[1])
    for e, rows in _parts(ends):
        for dz, into in zip(dzs, dw[e].split(sizes), strict=True):
            into.copy_(_op("linear_dw", backend)(dz[rows], x[rows]))
    return dw


def experts_dw_(
    backend: str,
    dzs: Sequence[Tensor],
    x: Tensor,
    ends: Tensor,
    main_grad: Tensor,
    inv_scale: Tensor,
    found_inf: Tensor,
    accumulate: bool,
) -> None:
    """Compute ``linear_dw_`` of each expert's rows into main_grad[e], as in ``experts_dw``; an expert without rows gets
    zeros where others' are stored.
    """
    if not accumulate:
        main_grad.zero_()
    sizes = [dz.shape[1] for dz in dzs]
    for e, rows in _parts(ends):
        for dz, into in zip(dzs, main_grad[e].split(sizes), strict=True):
            _op("linear_dw_", backend)(dz[rows], x[rows], into, inv_scale, found_inf, accumulate)


def rows_sum(backend: str, rows: Tensor, places: Tensor, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Compute the sums over k of factors[i, k] * rows[places[i, k]], in fp32, rounded once to ``dtype``.

    rows [R, C], places [M, K] int64, factors [M, K] fp32 or None for ones -> [M, C].
    """
    total = wide(rows.new_zeros(places.shape[0], rows.shape[1]))
    for k in range(places.shape[1]):
        one = wide(rows[places[:, k]])
        total = total + (one if factors is None else one * factors[:, k, None])
    return total.to(dtype)


def rows_dot(backend: str, a: Tensor, b: Tensor, places: Tensor) -> Tensor:
    """Compute the products of row i of a [M, C] with the rows places[i] [M, K] of b [R, C] in fp32: [M, K]."""
    found = [(wide(a) * wide(b[places[:, k]])).sum(1) for k in range(places.shape[1])]
    return torch.stack(found, 1) if found else wide(a.new_zeros(places.shape))


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "experts_order": experts_order,
    "experts_mlp": experts_mlp,
    "experts_dh": experts_dh,
    "experts_dx": experts_dx,
    "experts_dw": experts_dw,
    "experts_dw_": experts_dw_,
    "rows_sum": rows_sum,
    "rows_dot": rows_dot,
}
