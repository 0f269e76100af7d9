"""Rows that hold several documents, or end with padding: what is in them, and a proof that layers keep it apart.

Where ``position_ids`` begin again, transformers makes masks that let no document see another; but not beside an
``attention_mask``, even one of all ones, and not in every family.

What is asked of such inputs is found once for each tensor, on the host where it comes from, and goes with its copy to a
GPU (``carry``), which nobody then has to wait for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from spu.common.known import Known

__all__ = ["carry", "check_apart", "holds_several", "parting_documents", "row_lengths", "whole"]


def carry(given: Any, moved: Any) -> None:
    """Let copies of a decoder's inputs be known by what they are copies of, as far as values are asked for.

    Args:
        given: a microbatch's inputs, on the host.
        moved: the same on another device.
    """
    if not isinstance(given, Mapping):
        return
    asked: tuple[tuple[str, Known[Any]], ...] = ("position_ids", _lengths), ("attention_mask", _kept)
    for name, known in asked:
        tensor = given.get(name)
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2 or tensor.device.type != "cpu":
            continue
        known.note(moved[name], known(tensor))


def row_lengths(inputs: Mapping[str, torch.Tensor]) -> list[list[int]] | None:
    """Return the lengths of each row's documents, where some row holds several, or ends with padding behind its one
    (lengths that do not add up to the tokens). None for all other inputs.

    Args:
        inputs: of a decoder; "input_ids" int64 [batch, tokens], and "position_ids" of that shape, or "attention_mask"
            without them.
    """
    shape, positions, mask = inputs["input_ids"].shape, inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is not None:
        if positions.shape != shape or holds_several(inputs) is None or not (mask is None or whole(mask)):
            return None
        return _lengths(positions)
    if mask is None or mask.dim() != 2 or mask.shape != shape:
        return None
    kept = _kept(mask)
    if kept is None or not all(kept) or min(kept, default=0) == shape[1]:
        return None
    return [[count] for count in kept]


def whole(mask: torch.Tensor) -> bool:
    """Tell whether an ``attention_mask`` [batch, tokens] hides nothing."""
    kept = _kept(mask)
    return kept is not None and all(count == mask.shape[1] for count in kept)


@Known
def _lengths(positions: torch.Tensor) -> list[list[int]] | None:
    again, on = positions[:, 1:] == 0, positions[:, 1:] == positions[:, :-1] + 1
    if not again.any() or not (again | on).all():
        return None
    rows = [[0, *(at + 1 for at, begins in enumerate(row) if begins), positions.shape[1]] for row in again.tolist()]
    return [[end - begin for begin, end in itertools.pairwise(row)] for row in rows]


@Known
def _kept(mask: torch.Tensor) -> list[int] | None:
    """Return how many tokens of each row are no padding, if all padding is on the right."""
    kept = (mask != 0).sum(1)
    right = (mask != 0) == (torch.arange(mask.shape[1], device=mask.device) < kept[:, None])
    return kept.tolist() if right.all() else None


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
    if mask is None or whole(mask):
        rows = enumerate(_lengths(positions) or [])
        return next(((row, lengths[0]) for row, lengths in rows if len(lengths) > 1), None)
    again, on = positions[:, 1:] == 0, positions[:, 1:] == positions[:, :-1] + 1
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
    if not whole(mask):
        raise ValueError(
            "attention_mask hides tokens of rows whose position_ids begin again: transformers would let their "
            "documents see each other; leave attention_mask out, and let the padding's position_ids begin at 0 as well"
        )
    return {key: value for key, value in inputs.items() if key != "attention_mask"}


def check_apart(
    calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]], place: tuple[int, int], mixing: int | None = None
) -> None:
    """Prove that no layer lets a document see the one before it.

    Args:
        calls: (arguments, keywords) of each layer.
        place: (row, first token) of a document behind another one.
        mixing: a layer that is known to, whatever mask it gets.

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
        if number == mixing or not any(_hides(mask[min(row, len(mask) - 1)], at) for mask in masks):
            raise ValueError(
                f"layer {number} of this model would let documents that are packed in a row see each other: train with "
                "--pack off (a row for each document), or give rows whose position_ids do not begin again"
            )


def _hides(mask: torch.Tensor, at: int) -> bool:
    """Tell whether a mask [heads, queries, keys] hides the tokens before ``at`` from those from it on."""
    part = mask[:, at:, :at]
    return not bool(part.any()) if part.dtype == torch.bool else bool((part <= torch.finfo(part.dtype).min / 2).all())
