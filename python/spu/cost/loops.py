"""Layers that loop over tokens in Python: recurrences whose kernels are not installed (Mamba's) run some hundred
operators a token, minutes of counting for a row of 2,048. They are counted on rows of few tokens, as many together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from spu.common.torch_private import is_fake, tree_map_only
from spu.cost.footprint import Footprint
from spu.plan.layer_cost import LayerCost

__all__ = ["MOST_OPERATORS", "counted_short"]

MOST_OPERATORS = 3000
"""Of a layer's forward: the mixtures of experts and attentions of transformers have fewer, whatever the tokens."""

_SHORT = 16
_BYTES = (
    "own_bytes", "forward_extra_bytes", "backward_extra_bytes", "split_extra_bytes", "deferred_bytes", "left_bytes",
)  # fmt: skip
_FLOPS = ("forward_flops", "backward_flops", "deferred_flops")
_TRAFFIC = ("forward_traffic_bytes", "backward_traffic_bytes")


def counted_short(
    x: Any, inputs: Any, footprint: Callable[[Any, Any], Footprint]
) -> tuple[LayerCost, torch.Tensor] | None:
    """Return the cost of a decoder's layer with a loop over tokens, and the next layer's input.

    With as many tokens in rows of 8 and of 16, what a token takes is the same. What one turn of the loop takes is of
    more rows, so it falls with the length; and what it moves grows where each turn's backward fills a gradient for all
    tokens. So bytes and FLOPs follow a line in 1 / length, traffic a line in length.

    Args:
        x: hidden states, fake, [rows, tokens, width].
        inputs: the microbatch's.
        footprint: of the layer, given both, shorter.

    Returns:
        None for a layer without such a loop, what is not such hidden states, before or after, and rows that are short.
    """
    if not isinstance(x, torch.Tensor) or x.dim() != 3 or not is_fake(x) or x.shape[1] < 2 * _SHORT:
        return None
    tokens = x.shape[1]

    def shortened(length: int, rows: int) -> Footprint:
        given = torch.empty((rows, length, *x.shape[2:]), dtype=x.dtype, device=x.device)
        return footprint(given.requires_grad_(x.requires_grad), _shortened(inputs, tokens, length, rows))

    half, whole = _SHORT // 2, _SHORT
    try:
        fewer, more = shortened(half, 1).operators(), shortened(whole, 1).operators()
    except Exception:  # the whole layer will meet it, and say it
        return None
    if more + (more - fewer) * (tokens - whole) // half <= MOST_OPERATORS:
        return None
    rows = -(-x.shape[0] * tokens // whole)
    one, out = shortened(half, 2 * rows).cost()
    two, out = shortened(whole, rows).cost()
    if not isinstance(out, torch.Tensor) or out.shape[:2] != (rows, whole):
        return None
    after = torch.empty((*x.shape[:2], *out.shape[2:]), dtype=out.dtype, device=out.device)
    values: dict[str, Any] = {}
    for name in (*_BYTES, *_FLOPS, *_TRAFFIC):
        first, second = getattr(one, name), getattr(two, name)
        further = 2 * (tokens - whole) * (second - first)
        values[name] = max(second + further // (whole if name in _TRAFFIC else 2 * tokens), 0)
    values["input_bytes"] = x.numel() * x.element_size()
    values["output_bytes"] = after.numel() * after.element_size()
    return dataclasses.replace(two, **values), after.requires_grad_(out.requires_grad)


def _shortened(inputs: Any, tokens: int, short: int, rows: int) -> Any:
    """Return a batch whose rows are the beginning of its first one."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() < 2 or tensor.shape[1] != tokens:
            return tensor
        return tensor[:1, :short].expand(rows, short, *tensor.shape[2:]).contiguous()

    return tree_map_only(torch.Tensor, one, inputs)
