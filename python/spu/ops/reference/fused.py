"""The definition of the MLPs' and the linear cross-entropy's ops, in plain torch, on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spu.ops.reference.linear import activate, activate_backward, exact, rows_of, wide

__all__ = [
    "IMPLEMENTATIONS",
    "acted",
    "cross_entropy_dz",
    "cross_entropy_rows",
    "gate_up",
    "gated_dx",
    "gated_dz",
    "gated_linear",
    "linear_ce",
    "linear_ce_and_dz_",
    "linear_ce_dz",
    "mlp_dz",
    "row_sums",
]

_CHUNK_BYTES = 64 << 20  # of wide logits at a time
_CACHE_BYTES = 1 << 20  # of logits that a CPU takes at a time


def gate_up(gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    """Compute h = act(gate) * up in the precision of the (wide) operands, rounded once to ``dtype``."""
    return (activate(gate, activation) * up).to(dtype).contiguous()


@exact
def gated_linear(x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gate = x @ w_gate.T, up = x @ w_up.T, h = act(gate) * up; x [..., K], weights [N, K] -> [..., N] each.

    h comes from the unrounded products and is rounded once. gate and up are rounded on their own, for the backward,
    and empty unless ``keep``.
    """
    gate, up = F.linear(wide(x), wide(w_gate)), F.linear(wide(x), wide(w_up))
    h = gate_up(gate, up, activation, x.dtype)
    if not keep:
        return h, x.new_empty(0), x.new_empty(0)
    return h, gate.to(x.dtype).contiguous(), up.to(x.dtype).contiguous()


@exact
def gated_dz(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dgate = dh * up * act'(gate), dup = dh * act(gate), and recompute h: each in fp32, rounded once."""
    g, u, d = wide(gate), wide(up), wide(dh)
    acted = activate(g, activation)
    dgate = activate_backward(d * u, g, activation)
    return tuple(value.to(dh.dtype).contiguous() for value in (dgate, d * acted, acted * u))  # type: ignore[return-value]


@exact
def gated_dx(dgate: Tensor, dup: Tensor, w_gate: Tensor, w_up: Tensor) -> Tensor:
    """Compute dx = dgate @ w_gate + dup @ w_up, accumulated in fp32, rounded once. [..., N] -> [..., K]."""
    dx = rows_of(wide(dgate)).mm(wide(w_gate)) + rows_of(wide(dup)).mm(wide(w_up))
    return dx.to(dgate.dtype).view(*dgate.shape[:-1], w_gate.shape[1])


@exact
def acted(saved: Tensor, activation: str) -> Tensor:
    """Compute h = act(saved) in fp32, rounded once to the storage dtype."""
    return activate(wide(saved), activation).to(saved.dtype).contiguous()


def row_sums(dz: Tensor) -> Tensor:
    """Compute the sum over rows of dz [..., N] in fp32 (fp64 for fp64): [N], not rounded to the storage dtype."""
    return rows_of(wide(dz)).sum(0)


@exact
def mlp_dz(
    dy: Tensor, w_out: Tensor, saved: Tensor, activation: str, needs_h: bool, needs_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dz = (dy @ w_out) * act'(saved), rounded once, h = act(saved), and the sum over rows of the rounded dz.

    dy [..., M], w_out [M, N], saved [..., N] (the pre-activation; for relu, its result) -> dz and h [..., N] in the
    storage dtype, sums [N] as ``row_sums`` makes them; h and sums are empty where they are not needed.
    """
    dh = rows_of(wide(dy)).mm(wide(w_out)).view(saved.shape)
    dz = activate_backward(dh, wide(saved), activation).to(dy.dtype).contiguous()
    h = acted(saved, activation) if needs_h else saved.new_empty(0)
    return dz, h, row_sums(dz) if needs_sums else wide(dz.new_empty(0))


def _row_chunks(rows: int, row_bytes: int) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // max(1, row_bytes))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def _target_logits(logits: Tensor, target: Tensor, kept: Tensor) -> Tensor:
    """Return the logit of every row's target, 0 for ignored rows. logits [R, V], target and kept [R]."""
    found = logits.gather(1, torch.where(kept, target, 0)[:, None])[:, 0]
    return torch.where(kept, found, torch.zeros_like(found))


def cross_entropy_rows(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, product: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Compute ``linear_ce`` with the wide logits of some rows made by ``product(hidden, weight)``."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    loss, lse = (torch.empty(rows, dtype=dtype, device=hidden.device) for _ in range(2))
    for part in _row_chunks(rows, dtype.itemsize * vocabulary):
        logits, kept = product(hidden[part], weight), target[part] != ignore_index
        lse[part] = torch.logsumexp(logits, 1)
        loss[part] = torch.where(kept, lse[part] - _target_logits(logits, target[part], kept), 0)
    return loss, lse


def cross_entropy_dz(logits: Tensor, target: Tensor, lse: Tensor, grad_rows: Tensor, ignore_index: int) -> Tensor:
    """Compute ``linear_ce_dz`` from wide logits [R, V], which are overwritten; the result is not yet rounded."""
    kept = (target != ignore_index)[:, None]
    grads = torch.where(kept[:, 0], grad_rows, torch.zeros_like(grad_rows))[:, None]
    dz = logits.sub_(lse[:, None]).exp_()
    dz.scatter_add_(1, torch.where(kept[:, 0], target, 0)[:, None], -torch.ones_like(lse)[:, None])
    return dz.mul_(grads).masked_fill_(~kept, 0)


@exact
def linear_ce(hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Compute loss = lse - logits[target], lse = log sum exp(logits), logits = hidden @ weight.T, for every row.

    hidden [R, K], weight [V, K], target int64 [R] -> fp32 (fp64 for fp64 operands) [R] each. The loss of a row whose
    target is ``ignore_index`` is 0. Logits are never rounded, and exist for a bounded number of rows at a time.
    """
    return cross_entropy_rows(hidden, wide(weight), target, ignore_index, lambda h, w: F.linear(wide(h), w))


@exact
def linear_ce_dz(
    hidden: Tensor, weight: Tensor, target: Tensor, lse: Tensor, grad_rows: Tensor, ignore_index: int
) -> Tensor:
    """Compute dz = (softmax(logits) - onehot(target)) * grad_rows, rounded once to the storage dtype. -> [R, V].

    lse and grad_rows (the scaled gradient of every row's loss) are fp32 [R]. Ignored rows are zero whatever
    grad_rows holds.
    """
    logits = F.linear(wide(hidden), wide(weight))
    return cross_entropy_dz(logits, target, lse, grad_rows, ignore_index).to(hidden.dtype)


def cross_entropy_and_dz(logits: Tensor, target: Tensor, grad_rows: Tensor, ignore_index: int, dz: Tensor) -> Tensor:
    """Return the losses of ``linear_ce_and_dz_`` for wide logits [R, V], which are overwritten; the gradient goes to
    dz, which may be the same memory.

    On a CPU some rows at a time, which stay in the cache; their exponentials are made once, for the sum and for dz.
    """
    kept = target != ignore_index
    wanted, grads = torch.where(kept, target, 0)[:, None], torch.where(kept, grad_rows, 0)
    found = logits.gather(1, wanted)[:, 0]
    top, total = torch.empty_like(found), torch.empty_like(found)
    rows = max(1, _CACHE_BYTES // max(1, logits.shape[1] * logits.element_size())) if logits.is_cpu else len(logits)
    for part in (slice(first, first + rows) for first in range(0, len(logits), max(1, rows))):
        z = logits[part]
        torch.amax(z, 1, out=top[part])
        z.sub_(top[part, None]).exp_()
        torch.sum(z, 1, out=total[part])
        scale = (grads[part] / total[part])[:, None]
        if dz.dtype == z.dtype:
            torch.mul(z, scale, out=dz[part])
        else:  # with all passes 2.5 ns a value; by a product that converts, 3.3
            dz[part] = z.mul_(scale)
    of_target = ((found - top).exp_() / total - 1) * grads
    dz.scatter_(1, wanted, of_target.to(dz.dtype)[:, None])
    if not logits.is_cpu or not kept.all():  # NaN logits times 0
        dz.masked_fill_(~kept[:, None], 0)
    return torch.where(kept, total.log() - (found - top), 0)


@exact
def linear_ce_and_dz_(
    hidden: Tensor, weight: Tensor, target: Tensor, grad_rows: Tensor, logits: Tensor, dz: Tensor, ignore_index: int
) -> Tensor:
    """Return the loss of ``linear_ce`` and write dz of ``linear_ce_dz`` to dz [R, V], for which logits are made once.

    ``logits`` is memory for them, [R, V] fp32 (fp64 for fp64 operands), overwritten; dz may be the same.
    """
    if dz.numel() == 0:
        return torch.zeros_like(grad_rows)
    torch.mm(wide(hidden), wide(weight).t(), out=logits)
    return cross_entropy_and_dz(logits, target, grad_rows, ignore_index, dz)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "gated_linear": gated_linear,
    "gated_dz": gated_dz,
    "gated_dx": gated_dx,
    "mlp_dz": mlp_dz,
    "linear_ce": linear_ce,
    "linear_ce_dz": linear_ce_dz,
    "linear_ce_and_dz_": linear_ce_and_dz_,
}
