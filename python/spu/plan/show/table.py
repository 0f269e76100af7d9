"""A plan as a table of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from spu.common.units import columns, format_bytes, format_seconds
from spu.plan.memory import StageBytes
from spu.plan.show.streamed import stage_rows, streamed_lines

if TYPE_CHECKING:
    from spu.plan.plan import Plan, StagePlan

__all__ = ["plan_table"]

_HEADS = (
    *("stage", "device", "layers"),
    *("weights", "main grads", "masters", "moments", "activations", "wires", "workspace", "total", "budget"),
    *("forward", "backward", "update"),
)

_HOW = {"measured": "(measured on real ones)", "bound": "(a bound from its sizes)"}


def plan_table(plan: Plan, width: int | None = None) -> str:
    """Return the text: a line above, a row for each stage, a line below.

    Where that is wider than `width` columns, stages are columns instead of rows.
    """
    s = plan.settings
    how = [
        f"{s.schedule}, {s.microbatches_in_words}",
        *([f"{s.accumulate} times per step"] if s.accumulate > 1 else []),
        s.precision,
        _recompute(plan),
        *([f"state {s.state}"] if s.state != "fp32" else []),
        *([f"grads {s.grads} below"] if s.grads != "fp32" and plan.streaming is not None else []),
        *([f"transfer {' '.join(plan.codecs)}"] if plan.codecs and plan.streaming is None else []),
    ]
    rows = [_HEADS, *(_row(k, stage) for k, stage in enumerate(plan.stages))]
    words = 3  # stage, device and layers; the rest are numbers
    if plan.streaming is not None:
        rows, words = stage_rows(plan), 2
    lines = _lines(rows, words)
    if width is not None and max(map(len, lines)) > width:
        lines = _lines(list(zip(*rows, strict=True)), left=1)
    guess = " at a made-up speed; measure the layers for real seconds" if plan.predicted.basis == "nominal" else ""
    return "\n".join(
        [
            f"{plan.model or 'model'}: {'; '.join(how)}",
            *lines,
            *([] if plan.streaming is None else streamed_lines(plan, plan.streaming)),
            f"predicted: {format_seconds(plan.predicted.step_s)} per step, "
            + f"{format_seconds(plan.predicted.update_s)} of it the update; "
            + f"idle share {100 * plan.predicted.idle_share:.1f}% ({plan.predicted.basis}{guess})",
            *_uncounted(plan),
        ]
    )


def _uncounted(plan: Plan) -> list[str]:
    if not plan.uncounted:
        return []
    said = ", ".join(f"{name} {_HOW.get(how, how)}" for name, how in plan.uncounted)
    return [f"not counted on fake tensors: {said}"]


def _recompute(plan: Plan) -> str:
    count, layers = len(plan.recomputed_layers), plan.stages[-1].layers[1]
    if not count:
        return "activations kept"
    return "recompute" if count == layers else f"recompute of {count} of {layers} layers"


def _lines(rows: Sequence[tuple[str, ...]], left: int) -> list[str]:
    """Return aligned lines, the first `left` columns to the left, the rest to the right, a rule below the first row."""
    lines = columns(rows, left)
    rule = "  ".join("-" * max(map(len, column)) for column in zip(*rows, strict=True))
    return [lines[0], rule, *lines[1:]]


def _row(index: int, stage: StagePlan) -> tuple[str, ...]:
    names = stage.layer_names
    layers = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"
    sizes = (*(getattr(stage, part.name) for part in fields(StageBytes)), stage.total_bytes, stage.budget_bytes)
    times = (stage.forward_s, stage.backward_s, stage.update_s)
    return (str(index), stage.device, layers, *map(format_bytes, sizes), *map(format_seconds, times))
