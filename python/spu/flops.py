"""FLOPs of the ops that torch's counter does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import sdpa_flop_count

from spu.common import torch_private

__all__ = ["flop_formulas"]


def flop_formulas() -> dict[Any, Any]:
    """FLOPs of the ops that torch's counter does not know: ours, where they are registered, and CPU attention."""

    def input_gradient(dz: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
        return 2 * _rows(dz) * weight[0] * weight[1]

    def weight_gradient(dz: Sequence[int], x: Sequence[int], *args: Any, **kwargs: Any) -> int:
        return 2 * _rows(dz) * dz[-1] * x[-1]

    def linear(x: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
        return 2 * _rows(x) * weight[0] * weight[1]

    def gated(x: Sequence[int], w_gate: Sequence[int], *args: Any, **kwargs: Any) -> int:
        return 2 * linear(x, w_gate)

    def gated_mlp(
        x: Sequence[int], w_gate: Sequence[int], w_up: Sequence[int], w_down: Sequence[int], *args: Any, **kwargs: Any
    ) -> int:
        return 2 * linear(x, w_gate) + 2 * _rows(x) * w_down[0] * w_down[1]

    def gated_gradient(
        dgate: Sequence[int], dup: Sequence[int], w_gate: Sequence[int], *args: Any, **kwargs: Any
    ) -> int:
        return 2 * input_gradient(dgate, w_gate)

    def attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def our_attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any) -> int:
        batch, tokens, heads, head_dim = q
        return 4 * batch * heads * tokens * k[1] * head_dim  # as torch counts: the causal mask saves nothing

    def our_attention_gradient(
        dout: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any
    ) -> int:
        return our_attention(q, k, v) * 5 // 2

    def input_gradient_with_activation(
        dy: Sequence[int], saved: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any
    ) -> int:
        return input_gradient(dy, weight)

    formulas: dict[Any, Any] = {}
    cpu_attention = torch_private.flash_attention_for_cpu()
    if cpu_attention is not None:
        formulas[cpu_attention] = attention
    ours = {
        "linear": linear,
        "linear_dx": input_gradient,
        "linear_dw": weight_gradient,
        "linear_dw_": weight_gradient,
        "linear_dz_dx": input_gradient_with_activation,
        "linear_dw_db_": weight_gradient,
        "gated_linear": gated,
        "gated_dx": gated_gradient,
        "gated_dh": input_gradient,
        "gated_mlp": gated_mlp,
        "attention": our_attention,
        "attention_backward": our_attention_gradient,
        "linear_ce": linear,
        "linear_ce_dz": linear,
    }
    for name, formula in ours.items():
        if hasattr(torch.ops.spu, name):
            formulas[getattr(torch.ops.spu, name)] = formula
    return formulas


def _rows(shape: Sequence[int]) -> int:
    """Elements of all dimensions but the last."""
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows
