"""Bytes that ops of ours take for themselves while they run, beside their arguments and results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from spu.common.torch_private import is_fake, packet_of

__all__ = ["inner_bytes"]

_STAT_COLUMNS, _STAT_ROWS = 256, 4096  # kStatColumns and kStatRows of csrc/cpu


def inner_bytes(func: Any, args: Sequence[Any]) -> int:
    """Return the bytes of tensors that one call of an operator makes and frees; 0 for operators that are not ours.

    A mode of dispatch does not see them: a kernel makes them, or a composition that runs below it.

    Args:
        func: the operator, as a mode of dispatch is given it.
        args: of the call, real, meta or fake.
    """
    packet = packet_of(func)
    found = _INNER.get(packet.__name__) if packet is not None and getattr(func, "namespace", "") == "spu" else None
    return 0 if found is None else found(*args)


def _hidden(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> int:
    """Return the bytes of a multilayer perceptron's hidden values, which its second product reads."""
    return math.prod(x.shape[:-1]) * weight.shape[0] * x.element_size()


def _experts_hidden(x: torch.Tensor, ends: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor, *_: Any) -> int:
    """Return the bytes of the hidden values of the expert with most rows: of all rows where values are not known."""
    rows = x.shape[0]
    if not (ends.is_meta or is_fake(ends)):
        last = ends.tolist()
        rows = max((end - before for before, end in zip([0, *last], last)), default=0)
    return rows * w_down.shape[2] * x.element_size()


def _stats(hidden: torch.Tensor, weight: torch.Tensor, *_: Any) -> int:
    """Return the bytes of a maximum and a sum for each row and group of columns of the logits."""
    groups = -(-weight.shape[0] // _STAT_COLUMNS)
    return (8 * groups + 4) * min(hidden.shape[0], _STAT_ROWS)


_INNER: dict[str, Callable[..., int]] = {
    "gated_mlp": _hidden,
    "gated_mlp_add": _hidden,
    "mlp": _hidden,
    "experts_mlp": _experts_hidden,
    "linear_ce": _stats,
}
