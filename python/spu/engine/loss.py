"""The loss that is used where none is given, and what a loss is given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from spu.common.dtypes import HALVES
from spu.common.torch_private import pytree

__all__ = ["OnRawOutputs", "cross_entropy", "loss_of"]


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The default loss: mean cross entropy in fp32.

    Args:
        outputs: logits [..., classes].
        targets: class indices int64 [...]; -100 is not counted.
    """
    return F.cross_entropy(outputs.flatten(0, -2).float(), targets.flatten())


class OnRawOutputs(functools.partial):  # type: ignore[type-arg]
    """A loss that is given the model's outputs as they are."""


def loss_of(loss_fn: Callable[[Any, Any], torch.Tensor], outputs: Any, targets: Any) -> torch.Tensor:
    """The loss of a microbatch. It sees 16-bit outputs in fp32: a sum over rows would overflow, or stop growing, in 16
    bits.
    """
    if not isinstance(loss_fn, OnRawOutputs):
        outputs = pytree.tree_map_only(torch.Tensor, _wide, outputs)
    return loss_fn(outputs, targets)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in HALVES else tensor
