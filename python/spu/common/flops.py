"""FLOPs of the ops that torch's counter does not know."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import sdpa_flop_count

from spu.common import torch_private

__all__ = ["flop_formulas"]

Shape = Sequence[int]


def flop_formulas() -> dict[Any, Any]:
    """Return, by op, functions of its arguments' shapes: for our registered ops, and for CPU attention."""
    formulas = {getattr(torch.ops.spu, name): made for name, made in _OURS.items() if hasattr(torch.ops.spu, name)}
    cpu_attention = torch_private.flash_attention_for_cpu()
    return (
        formulas
        if cpu_attention is None
        else {**formulas, cpu_attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    )


def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Return the FLOPs of the product, and of its input's gradient, which has ``dz`` in place of ``x``."""
    return 2 * _rows(x) * weight[0] * weight[1]


def _linear_dw(dz: Shape, x: Shape, *_: Any, **__: Any) -> int:
    return 2 * _rows(dz) * dz[-1] * x[-1]


def _linear_dw_each(dzs: Sequence[Shape], x: Shape, *_: Any, **__: Any) -> int:
    return sum(_linear_dw(dz, x) for dz in dzs)


def _gated_mlp(x: Shape, w_gate: Shape, w_up: Shape, w_down: Shape, *_: Any, **__: Any) -> int:
    return 2 * _linear(x, w_gate) + 2 * _rows(x) * w_down[0] * w_down[1]


def _mlp(x: Shape, w_in: Shape, b_in: Shape | None, w_out: Shape, *_: Any, **__: Any) -> int:
    return _linear(x, w_in) + 2 * _rows(x) * w_out[0] * w_out[1]


def _attention(q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    batch, tokens, heads, head_dim = q
    return 4 * batch * heads * tokens * k[1] * head_dim  # as torch counts: the causal mask saves nothing


def _rows(shape: Shape) -> int:
    """Return the product of all dimensions but the last."""
    return math.prod(shape[:-1])


_OURS: dict[str, Callable[..., int]] = {
    "linear": _linear,
    "linear_dx": _linear,
    "linear_dw": _linear_dw,
    "linear_dw_": _linear_dw,
    "linear_dz_dx": lambda dy, saved, weight, *_, **__: _linear(dy, weight),
    "linear_dw_db_": _linear_dw,
    "linear_add": _linear,
    "linear_each": lambda x, weights, *_, **__: sum(_linear(x, weight) for weight in weights),
    "linear_dw_each_": _linear_dw_each,
    "gated_linear": lambda x, w_gate, *_, **__: 2 * _linear(x, w_gate),
    "gated_dx": lambda dgate, dup, w_gate, *_, **__: 2 * _linear(dgate, w_gate),
    "gated_dh": _linear,
    "gated_mlp": _gated_mlp,
    "gated_mlp_add": _gated_mlp,
    "experts_mlp": lambda x, ends, w_gate_up, w_down, *_, **__: _linear(x, w_gate_up[1:]) + _linear(x, w_down[1:]),
    "experts_dh": lambda dy, ends, w_down, *_, **__: _linear(dy, w_down[1:]),
    "experts_dx": lambda dgate, dup, ends, w_gate_up, *_, **__: _linear(dgate, w_gate_up[1:]),
    "experts_dw": _linear_dw_each,
    "experts_dw_": _linear_dw_each,
    "mlp": _mlp,
    "mlp_dz": _linear,
    "attention": _attention,
    "attention_backward": lambda dout, q, k, *_, **__: _attention(q, k) * 5 // 2,
    "linear_ce": _linear,
    "linear_ce_dz": _linear,
    "linear_ce_and_dz": _linear,
    "linear_ce_and_dz_": _linear,
}
