"""A streamed plan as a table: a line for each kind of stage, what tiers hold, what moves, what a step waits for."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from spu.common.units import columns, format_bytes, format_seconds
from spu.plan.memory import StageBytes

if TYPE_CHECKING:
    from spu.plan.plan import Plan, StagePlan
    from spu.plan.streaming import StreamingPlan

__all__ = ["stage_kinds", "stage_rows", "streamed_lines"]

_HEADS = ("stages", "layers", "weights", "main grads", "masters", "moments", "activations", "forward", "backward")
_WHERE = {
    "keep": "activations kept there",
    "exact": "activations below, as they are",
    "fp16": "activations below in fp16",
    "int8": "activations below in int8",
    "int4": "activations below in int4",
}


def stage_kinds(plan: Plan) -> list[list[int]]:
    """Return runs of neighbouring stages that are alike in their bytes, and in their times to a thousandth."""
    runs: list[list[int]] = []
    for k, stage in enumerate(plan.stages):
        if runs and _kind(stage) == _kind(plan.stages[runs[-1][0]]):
            runs[-1].append(k)
        else:
            runs.append([k])
    return runs


def _kind(stage: StagePlan) -> tuple[object, ...]:
    sizes = (stage.param_bytes, stage.main_grad_bytes, stage.master_bytes, stage.moment_bytes, stage.each_bytes)
    return (*sizes, len(stage.recompute), f"{stage.forward_s:.2e}", f"{stage.backward_s:.2e}")


def stage_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Return the heads and a row for each kind of stage: bytes and seconds of one such stage."""
    rows: list[tuple[str, ...]] = [_HEADS]
    for run in stage_kinds(plan):
        first = plan.stages[run[0]]
        names = [name for k in run for name in plan.stages[k].layer_names]
        layers = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"
        stages = str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}, each"
        sizes = [format_bytes(getattr(first, entry.name)) for entry in fields(StageBytes)[:5]]
        rows.append((stages, layers, *sizes, format_seconds(first.forward_s), format_seconds(first.backward_s)))
    return rows


def streamed_lines(plan: Plan, streaming: StreamingPlan) -> list[str]:
    """Return lines of text: how layers move, bytes of every tier, what crosses, what a step waits for."""
    s, step = streaming, plan.predicted.step_s
    kinds, turns = list(dict.fromkeys(s.residency)), ", in turn," if len(plan.devices) > 1 else ""
    through, each = " and ".join(plan.devices) + turns, " on each device" if turns else ""
    rows = [("tier", "needs", "may use", "")]
    for tier in s.tiers:
        share = f"{100 * tier.peak_bytes / tier.budget_bytes:.0f}%" if tier.budget_bytes else ""
        rows.append((tier.name, format_bytes(tier.peak_bytes), format_bytes(tier.budget_bytes), share))
    moved = [f"{format_bytes(s.link_in_bytes)} in, {format_bytes(s.link_out_bytes)} out over the link"]
    if not s.link_in_bytes + s.link_out_bytes:
        moved = []
    if s.disk_read_bytes + s.disk_written_bytes:
        moved.append(
            f"{format_bytes(s.disk_read_bytes)} read, {format_bytes(s.disk_written_bytes)} written on the disk"
        )
    busy = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in s.seconds.items() if seconds)
    share = f"{100 * s.limit_s / step:.0f}%" if step else "100%"
    unit = "tokens" if plan.tokens else "rows"
    hidden = f"from {s.hidden_tokens:,} {unit} a step on" if s.hidden_tokens else f"by no number of {unit}"
    return [
        f"{' and '.join(kinds)} through {through} from the {s.store}: {s.slots} slots of weights, "
        f"{s.state_slots} of gradients and state, {format_bytes(s.ring_bytes)} together{each}; {_WHERE[s.activations]}",
        *columns(rows, left=1),
        f"a step moves {'; '.join(moved) or 'nothing'}",
        f"busy in a step: {busy}",
        f"bottleneck: {s.bottleneck}; {share} of the streaming limit, {format_seconds(s.limit_s)} a step; moving is "
        f"hidden {hidden}",
    ]
