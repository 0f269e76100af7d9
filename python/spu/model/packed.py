"""Rows that hold several documents: transformers is told so, and it is proved that its layers keep them apart.

Where ``position_ids`` begin again, transformers makes masks that let no document see another; but not beside an
``attention_mask``, even one of all ones, and not in every family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

__all__ = ["check_apart", "holds_several", "parting_documents"]


def holds_several(inputs: Mapping[str, torch.Tensor]) -> tuple[int, int] | None:
    """Return where a document begins in a row behind another one, as (row, place); None if no row holds several, or
    positions do anything else than count on and begin again at 0.

    Args:
        inputs: of a decoder; "position_ids" int64 [batch, tokens], "attention_mask" [batch, tokens] or more.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if positions is None or positions.dim() != 2 or positions.device.type == "meta":
        return None
    if mask is not None and mask.shape != positions.shape:
        return None
    again, on = positions[:, 1:] == 0, positions[:, 1:] == positions[:, :-1] + 1
    if mask is not None:
        both = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
        again, on = again & both, on | ~both
    places = again.nonzero()
    return (int(places[0, 0]), int(places[0, 1]) + 1) if len(places) and (again | on).all() else None


def parting_documents(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a decoder's inputs as transformers needs them to keep the documents of a row apart: without a mask.

    Raises:
        ValueError: the mask hides something in such rows.
    """
    mask = inputs.get("attention_mask")
    if mask is None or holds_several(inputs) is None:
        return inputs
    if not (mask != 0).all():
        raise ValueError(
            "attention_mask hides tokens of rows whose position_ids begin again: transformers would let their "
            "documents see each other; leave attention_mask out, and let the padding's position_ids begin at 0 as well"
        )
    return {key: value for key, value in inputs.items() if key != "attention_mask"}


def check_apart(calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]], place: tuple[int, int]) -> None:
    """Prove that no layer lets a document see the one before it.

    Args:
        calls: (arguments, keywords) of each layer.
        place: (row, first token) of a document behind another one.

    Raises:
        ValueError: a layer gets no mask, or one that does not hide the document before.
    """
    row, at = place
    for number, (arguments, keywords) in enumerate(calls):
        masks = [
            value
            for value in (keywords.get("attention_mask"), *arguments)
            if isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[-1] == value.shape[-2] > at
        ]
        if not any(_hides(mask[min(row, len(mask) - 1)], at) for mask in masks):
            raise ValueError(
                f"layer {number} of this model would let documents that are packed in a row see each other: train with "
                "--pack off (a row for each document), or give rows whose position_ids do not begin again"
            )


def _hides(mask: torch.Tensor, at: int) -> bool:
    """Tell whether a mask [heads, queries, keys] hides the tokens before ``at`` from those from it on."""
    part = mask[:, at:, :at]
    return not bool(part.any()) if part.dtype == torch.bool else bool((part <= torch.finfo(part.dtype).min / 2).all())
