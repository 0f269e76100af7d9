"""Predicted beside measured: a plan and a step that ran by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from spu.common.units import columns, format_bytes, format_seconds
from spu.plan.plan import Plan
from spu.schedules import Timeline

__all__ = ["comparison", "replanned"]

_FAR = 1.5  # times: a shared machine's speed changes by a third within an hour


def comparison(plan: Plan, timeline: Timeline, step_s: float, peak_bytes: Mapping[str, int] | None = None) -> list[str]:
    """Return lines of text: time of a step, bubble, each device's work and peak bytes, predicted and measured.

    Args:
        plan: what was predicted.
        timeline: of one run of the schedule, measured.
        step_s: seconds of a whole step, measured.
        peak_bytes: the most bytes each device held, measured; devices that are not in it are left out. A "cpu" entry
            is the whole process, Python included, and is set against all CPU devices together.
    """
    p = plan.predicted
    expected = plan.timeline()
    rows = [
        ("", "predicted", "measured", ""),
        _row("step", p.step_s, step_s),
        _row("pipeline", expected.makespan, timeline.makespan),
        ("idle share", f"{100 * p.idle_share:.1f}%", f"{100 * timeline.idle_share:.1f}%", ""),
    ]
    rows += map(_row, [f"{name} works" for name in plan.devices], _work(plan, expected), _work(plan, timeline))
    rows += _memory_rows(plan, peak_bytes or {})
    return columns(rows, left=1) + _remarks(plan, step_s)


def replanned(before: Plan, after: Plan) -> str:
    """Return a line of text: what planning again has changed."""
    if [s.layers for s in before.stages] == [
        s.layers for s in after.stages
    ] and before.settings.schedule == after.settings.schedule:
        return f"planned again: the stages stay, {format_seconds(after.predicted.step_s)} a step"
    cuts = [", ".join(f"{s.device} {s.layers[1] - s.layers[0]}" for s in plan.stages) for plan in (before, after)]
    how = f"{after.settings.schedule}, {after.settings.microbatches_in_words}"
    return f"planned again: layers {cuts[0]} -> {cuts[1]}; {how}; {format_seconds(after.predicted.step_s)} a step"


def _remarks(plan: Plan, step_s: float) -> list[str]:
    """Return a line where a step took another time by far than was predicted: why, and what to do."""
    predicted, basis = plan.predicted.step_s, plan.predicted.basis
    times = max(step_s, predicted) / max(min(step_s, predicted), 1e-9)
    if times < _FAR:
        return []
    if basis == "nominal":
        return ["The prediction is at made-up speeds: its shares count, its seconds do not; measure=True times layers."]
    why = {
        "measured": "other work on the devices now, or while the layers were timed, or an input that takes longer",
        "estimated": "it rests on counted work and the devices' measured speeds; measure=True times the layers",
    }
    return [
        f"A step took {step_s / max(predicted, 1e-9):.2g} times its predicted time: {why.get(basis, basis)}. "
        "To plan again from what a step took: --replan, or trainer.replan()."
    ]


def _work(plan: Plan, timeline: Timeline) -> list[float]:
    """Return the seconds of work on each device."""
    ranks = {name: rank for rank, name in enumerate(plan.devices)}
    seconds = [0.0] * len(ranks)
    for span in timeline.spans:
        seconds[ranks[plan.stages[span.stage].device]] += span.seconds
    return seconds


def _memory_rows(plan: Plan, measured: Mapping[str, int]) -> list[tuple[str, str, str, str]]:
    predicted = dict(zip(plan.devices, plan.predicted.peak_bytes))
    if plan.streaming is not None:
        predicted |= {tier.name: tier.peak_bytes for tier in plan.streaming.below}
    both = [(name, peak, measured[name]) for name, peak in predicted.items() if name in measured]
    rows = [_row(f"{name} peak", peak, found, format_bytes) for name, peak, found in both]
    cpus = [peak for name, peak in predicted.items() if name.startswith("cpu")]
    if "cpu" in measured and cpus:
        rows.append(
            ("cpu peak", format_bytes(sum(cpus)), format_bytes(measured["cpu"]), "with Python, libraries and files")
        )
    return rows


def _row(
    name: str, before: float, after: float, words: Callable[[float], str] = format_seconds
) -> tuple[str, str, str, str]:
    """Return predicted and measured in words, with their difference."""
    return name, words(before), words(after), f"{100 * (after / before - 1):+.1f}%" if before > 0 else ""
