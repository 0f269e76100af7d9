"""The definition of attention's ops, in plain torch, on any device: every score at once, in fp32 (fp64 for fp64)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spu.ops.reference.linear import exact, wide

__all__ = ["IMPLEMENTATIONS", "attention", "attention_backward"]


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """Return [B, T, G, D] as wide [B, heads, T, D], each key and value head repeated for its query heads."""
    return wide(x).transpose(1, 2).repeat_interleave(heads // x.shape[2], dim=1)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """Compute scale * q @ k.T, [B, H, T, S]; -inf where a query does not see a key."""
    scores = _heads_first(q, q.shape[2]) @ _heads_first(k, q.shape[2]).transpose(2, 3) * scale
    if causal:
        unseen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(unseen, float("-inf"))
    return scores


@exact
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Compute out = softmax(scale * q @ k.T) @ v, rounded once, and the log-sum-exp of the scores (fp32) [B, H, T]."""
    scores = _scores(q, k, scale, causal)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ _heads_first(v, q.shape[2])
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse.contiguous()


@exact
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq [B, T, H, D], dk and dv [B, S, G, D], each rounded once. The weights are recomputed from ``lse``."""
    heads = q.shape[2]
    p = (_scores(q, k, scale, causal) - lse[..., None]).exp()
    d, o = _heads_first(dout, heads), _heads_first(out, heads)
    ds = p * (d @ _heads_first(v, heads).transpose(2, 3) - (d * o).sum(-1, keepdim=True)) * scale

    def of_group(x: Tensor) -> Tensor:
        return x.unflatten(1, (k.shape[2], -1)).sum(2).transpose(1, 2).to(k.dtype).contiguous()

    dq = (ds @ _heads_first(k, heads)).transpose(1, 2).to(q.dtype).contiguous()
    dk = ds.transpose(2, 3) @ _heads_first(q, heads)
    return dq, of_group(dk), of_group(p.transpose(2, 3) @ d)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"attention": attention, "attention_backward": attention_backward}
