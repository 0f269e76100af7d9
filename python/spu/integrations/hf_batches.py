"""The batches of one update as one batch: padded to one length where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from spu.engine.labels import IGNORED

__all__ = ["joined"]

_PADDING = {"labels": IGNORED, "attention_mask": 0, "input_ids": 0, "position_ids": 0, "token_type_ids": 0}


def joined(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return batches, one below the other; shorter ones are padded on the right with tokens that count nothing.

    A decoder looks back only, so that what it computes for the others does not change.

    Args:
        batches: dicts of tensors [rows, tokens], or [rows].

    Raises:
        ValueError: they have other keys, or a tensor that no padding is known for.
    """
    first = batches[0]
    if any(batch.keys() != first.keys() for batch in batches):
        raise ValueError(
            f"the batches of one update have different keys: {', '.join(sorted({k for b in batches for k in b}))}; let "
            "the collator give each the same"
        )
    return {key: _column(key, [batch[key] for batch in batches]) for key in first}


def _column(key: str, values: list[Any]) -> Any:
    if not all(isinstance(value, torch.Tensor) for value in values):
        if all(value == values[0] for value in values):
            return values[0]
        raise ValueError(f"{key!r} is no tensor and differs between the batches of one update: leave it out")
    if any(value.shape[1:] != values[0].shape[1:] for value in values):
        if key not in _PADDING or any(value.dim() != 2 for value in values):
            shapes = ", ".join(str(tuple(value.shape)) for value in values)
            raise ValueError(f"{key!r} has shapes {shapes} in one update: let the collator pad to one length")
        longest = max(value.shape[1] for value in values)
        pad = torch.nn.functional.pad
        values = [pad(value, (0, longest - value.shape[1]), value=_PADDING[key]) for value in values]
    return values[0] if len(values) == 1 else torch.cat(values)
