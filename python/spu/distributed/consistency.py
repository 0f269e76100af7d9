"""What the processes of a training must have been given alike, as facts that can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from spu import __version__
from spu.common.torch_private import pytree
from spu.distributed.step_consistency import BATCH as EACH_BATCH
from spu.engine.base import sampled

__all__ = ["BATCH", "HINTS", "WEIGHTS", "described", "given_facts"]

_PLAIN = (bool, int, float, str, type(None))

WEIGHTS, BATCH = "set of initial weights", "first batch"

HINTS: Mapping[str, str] = {
    WEIGHTS: "with the same seed (torch.manual_seed(...) before the model is made)",
    EACH_BATCH: "in the same order (one seed for all, and no DistributedSampler): replicas share the rows of a batch "
    "among themselves",
    BATCH: "without a DistributedSampler: replicas share the rows of a batch among themselves",
}
"""What helps, by the name of a fact."""


def given_facts(batch: Any, optimizer: Any, loss_fn: Any, scaler: Mapping[str, Any]) -> dict[str, Any]:
    """Return, by name, as JSON, what would train another model without a word if one process had another of it.

    Args:
        batch: inputs and targets of the first step; of their values some are compared.
        optimizer, loss_fn: as they were given; see :func:`described`.
        scaler: the loss scaler's state.
    """
    leaves = pytree.tree_leaves(batch)
    tensors = {str(index): leaf.detach() for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    hashed = hashlib.sha256(repr([leaf for leaf in leaves if isinstance(leaf, _PLAIN)]).encode())
    for name, sample in sampled(tensors).items():
        hashed.update(f"{name} {sample.shape} {sample.dtype}\n".encode() + sample.values)
    return {
        "version of torch": torch.__version__.partition("+")[0],
        "version of spu": __version__,
        "optimizer": described(optimizer),
        "loss function": described(loss_fn),
        "loss scale": dict(scaler),
        BATCH: hashed.hexdigest(),
    }


def described(value: Callable[..., Any] | object) -> str:
    """Return text that is the same for the same function or settings, in any process.

    Attributes are compared of torch's own objects alone: the user's may well have a rank among them.
    """
    if isinstance(value, partial):
        keywords = [f"{name}={_plain(each)}" for name, each in sorted(value.keywords.items())]
        return f"{described(value.func)}({', '.join([*map(_plain, value.args), *keywords])})"
    if hasattr(value, "__qualname__"):
        return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
    plain = sorted(vars(value).items()) if type(value).__module__.startswith("torch.") else []
    own = [f"{name}={_plain(each)}" for name, each in plain if not name.startswith("_")]
    return f"{described(type(value))}: {', '.join(own)}"


def _plain(value: Any) -> str:
    """Return a value's text; of what has none that another process would share, its type's."""
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_plain, value))})"
    return repr(value) if isinstance(value, _PLAIN) else type(value).__qualname__
