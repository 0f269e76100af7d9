"""Labels as Hugging Face's data sets have them: beside the inputs, and not shifted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from spu.engine.microbatch import as_dicts

__all__ = ["IGNORED", "labelled", "shifted"]

IGNORED = -100


def labelled(inputs: Any, targets: Any, *, shift: bool, needed: bool = True) -> tuple[Any, Any]:
    """Return inputs and targets as dicts and tensors; without targets, the ``labels`` among the inputs are these.

    Args:
        inputs: a pytree of tensors [batch, ...]; mappings such as a ``BatchEncoding`` become dicts.
        targets: likewise, or None.
        shift: the targets are labels of a causal language model, see :func:`shifted`.
        needed: there must be targets.

    Raises:
        ValueError: no targets; ``shift`` of targets that are not one tensor of labels.
    """
    inputs, targets = as_dicts(inputs), as_dicts(targets)
    if targets is None and isinstance(inputs, Mapping) and "labels" in inputs:
        targets = inputs["labels"]
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
    if needed and targets is None:
        raise ValueError("no targets: give them beside the inputs, or as 'labels' in a dict of inputs")
    return inputs, shifted(targets) if shift and targets is not None else targets


def shifted(labels: Any) -> torch.Tensor:
    """Return the targets of each position: the label of the next one, and ``IGNORED`` for the last.

    As ``transformers.loss.loss_utils.ForCausalLMLoss`` does, so that the mean over counted targets is its loss.

    Args:
        labels: integers [batch, tokens]; ``IGNORED`` ones are not counted.

    Raises:
        ValueError: something else.
    """
    if not isinstance(labels, torch.Tensor) or labels.dim() != 2 or labels.is_floating_point():
        what = (
            f"a {labels.dtype} tensor of shape {tuple(labels.shape)}"
            if isinstance(labels, torch.Tensor)
            else f"a {type(labels).__name__}"
        )
        raise ValueError(
            f"shift=True takes labels as integers [batch, tokens], as a causal language model has them, got {what}: "
            "leave shift out, and give the target of each position"
        )
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
