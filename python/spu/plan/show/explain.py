"""A plan in words for newcomers."""

from __future__ import annotations

from spu.common.units import format_bytes, format_seconds
from spu.plan.machine import Machine
from spu.plan.plan import Plan
from spu.plan.show.curve import peak_moment

__all__ = ["explain"]

_SCHEDULES = {
    "gpipe": "all forwards, then all backwards",
    "1f1b": "one forward, one backward in turn",
    "interleaved": "one forward, one backward in turn, several stages on each device",
    "zb": "backwards split, so that weight gradients fill the gaps",
    "zbv": "backwards split, two stages on each device, down and up again",
    "layer_outer": "all microbatches through a stage before the next one",
}


def explain(
    plan: Plan,
    machine: Machine | None = None,
    parameters: int = 0,
    planned_s: float | None = None,
    width: int | None = None,
) -> list[str]:
    """Return lines of text: the plan's table for a terminal of `width` columns, with sentences above and below it."""
    size = f" ({parameters / 1e9:.2f}B parameters)" if parameters else ""
    shape = f"{plan.rows} x {plan.tokens} tokens" if plan.tokens else f"{plan.rows} rows"
    runs = f", {plan.settings.accumulate} times" if plan.settings.accumulate > 1 else ""
    lines = [
        f"{plan.model or 'the model'}{size} fits.",
        f"A step is {plan.settings.microbatches_in_words} of {shape}{runs}; order {plan.settings.schedule}: "
        f"{_SCHEDULES.get(plan.settings.schedule, 'a schedule of its own')}.",
        "",
        plan.table(width),
        "",
    ]
    budgets = {stage.device: stage.budget_bytes for stage in plan.stages}
    for rank, (name, peak) in enumerate(zip(plan.devices if plan.streaming is None else (), plan.predicted.peak_bytes)):
        share = 100 * peak / budgets[name]
        lines.append(
            f"{name}: at most {format_bytes(peak)} of {format_bytes(budgets[name])} ({share:.0f}%), "
            f"{peak_moment(plan, rank)}"
        )
    if machine is not None:
        lines += _speed_lines(plan, machine)
    lines.append(_time_line(plan))
    if planned_s is not None:
        lines.append(f"(planned in {format_seconds(planned_s)})")
    return lines


def _speed_lines(plan: Plan, machine: Machine) -> list[str]:
    lines = []
    for k, device in enumerate(machine.devices):
        where = machine.made_up.get(device.name)
        source = f"NOMINAL, {where}" if where else "measured here"
        used = "" if device.name in plan.devices else "; not used: the step is faster without it"
        if used and plan.streaming is not None and device.name.startswith("cpu"):
            used = "; it holds what the other one streams, and updates it"
        lines.append(f"{device.name}: speed taken as {machine.speeds[k].flops / 1e12:.3g} TFLOP/s ({source}){used}")
    return lines


def _time_line(plan: Plan) -> str:
    p = plan.predicted
    tokens = plan.rows * plan.tokens * plan.settings.parts
    rate = f", {tokens / p.step_s:,.0f} tokens/s" if tokens and p.step_s else ""
    crossing = sum(p.link_bytes)
    if plan.streaming is not None:
        return f"a step takes about {format_seconds(p.step_s)}{rate}"
    links = f"; {format_bytes(crossing)} cross the links in a step" if crossing else ""
    slowest = max(plan.stages, key=lambda stage: stage.forward_s + stage.backward_s)
    return (
        f"a step takes about {format_seconds(p.step_s)}{rate}; the slowest stage is on {slowest.device}; devices idle "
        f"{100 * p.idle_share:.0f}% of it{links}"
    )
