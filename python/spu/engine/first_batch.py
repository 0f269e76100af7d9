"""Mistakes in a first batch that would train without an error, but not as intended."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from spu.common import torch_private
from spu.engine.loss import cross_entropy
from spu.engine.microbatch import at_least, batch_rows
from spu.model.huggingface import Embed
from spu.model.layers import Layer

__all__ = ["check_batch", "with_rows"]


def with_rows(inputs: Any, targets: Any, parts: int) -> tuple[Any, Any]:
    """Return the first batch as a plan wants it: with a row for each of ``parts`` microbatches. Warn where rows have to
    be repeated for that.
    """
    rows = batch_rows(inputs)
    if not 0 < rows < parts:
        return inputs, targets
    warnings.warn(
        f"the first batch has {rows} rows, fewer than {parts} microbatches (microbatches x accumulate): such a batch "
        "is cut into single rows. If all are as small, lower microbatches or accumulate",
        stacklevel=4,
    )
    return at_least(inputs, parts), at_least(targets, parts)


def check_batch(layers: Sequence[Layer], inputs: Any, targets: Any, loss_fn: Callable[[Any, Any], Any]) -> None:
    """Check the first batch of a model, and warn if the model is in evaluation mode.

    Raises:
        ValueError: a language model's targets are its inputs, not shifted: it would learn to repeat what it reads; or
            rows hold several documents, which its layers would let see each other.
    """
    dropping = [module for layer in layers for module in layer.module.modules() if _drops(module)]
    if dropping and not any(module.training for module in dropping):
        warnings.warn(
            "the model is in evaluation mode, as from_pretrained leaves it: its dropout is off. Call model.train() "
            "before training, or set the dropout to 0",
            stacklevel=3,
        )
    of_tokens = any(layer.wants_inputs for layer in layers)  # a decoder of transformers
    if of_tokens and loss_fn is cross_entropy and _same_tokens(inputs, targets):
        raise ValueError(
            "targets equal input_ids: the model would learn to repeat each token. transformers' models shift labels "
            "themselves, this trainer does where it is told: ModelParallelTrainer(..., shift=True); or give inputs "
            "ids[:, :-1] and targets ids[:, 1:]"
        )
    for module in (layer.module for layer in layers):
        if isinstance(module, Embed):
            module.check_inputs(inputs)


def _drops(module: nn.Module) -> bool:
    if isinstance(module, torch_private.DropoutNd):
        return module.p > 0
    dropout = getattr(module, "attention_dropout", 0.0)
    return isinstance(dropout, float) and dropout > 0


def _same_tokens(inputs: Any, targets: Any) -> bool:
    """Tell whether every counted target is the token at its own place, and some are not the next token."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not (isinstance(ids, torch.Tensor) and isinstance(targets, torch.Tensor) and ids.shape == targets.shape):
        return False
    if ids.dim() != 2 or ids.is_floating_point() or targets.is_floating_point():
        return False
    targets = targets.to(ids.device)
    counted = targets != -100
    if not bool(counted.any()) or not torch.equal(ids[counted], targets[counted].to(ids.dtype)):
        return False
    following = counted[:, :-1]
    return not torch.equal(ids[:, 1:][following], targets[:, :-1][following].to(ids.dtype))
