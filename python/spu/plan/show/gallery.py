"""A plan as one picture: what lies where, the predicted timeline, and memory over time under its budgets."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from spu.common.units import format_bytes, format_seconds
from spu.plan.show.colors import FAINT, IDLE, TEXT
from spu.plan.show.curve import memory_curve
from spu.plan.show.picture import draw_bars, new_figure

if TYPE_CHECKING:
    from spu.plan.plan import Plan

__all__ = ["draw_plan"]

_CATEGORIES = {
    "param_bytes": ("weights", "#4c78a8"),
    "main_grad_bytes": ("main gradients", "#72b7b2"),
    "master_bytes": ("masters", "#9ecae9"),
    "moment_bytes": ("moments", "#b6a6ca"),
    "saved_bytes": ("activations", "#f2a541"),
    "wire_bytes": ("wires", "#d1495b"),
    "workspace_bytes": ("workspace", "#c5ccd4"),
}
_ROW = 0.42  # inches


def draw_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Draws a plan; the file's ending decides the format (png, svg, pdf).

    Raises:
        ImportError: without matplotlib; says how to install it.
    """
    count = len(plan.devices)
    heights = [0.5 + _ROW * len(plan.stages), 0.5 + _ROW * count, 1.2 + 0.5 * count]
    figure = new_figure(sum(heights) + 1.5, layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, height_ratios=heights)
    figure.suptitle(_title(plan), color=TEXT, fontsize=12, fontweight="bold", x=0.01, ha="left")
    _draw_bytes(top, plan)
    _draw_timeline(middle, plan)
    _draw_curves(bottom, plan)
    figure.savefig(os.fspath(path), facecolor="white")


def _title(plan: Plan) -> str:
    p = plan.predicted
    step = f"{format_seconds(p.step_s)} a step, {100 * p.idle_share:.0f}% idle ({p.basis})"
    s = plan.settings
    return f"{plan.model or 'plan'}: {s.schedule}, {s.microbatches} microbatches, {s.precision}; {step}"


def _draw_bytes(axis: Any, plan: Plan) -> None:
    """A bar per stage of what it holds at its peak, by category; the budget of its device as a line."""
    for k, stage in enumerate(plan.stages):
        left = 0.0
        for name, (word, color) in _CATEGORIES.items():
            size = getattr(stage, name) / 1e9
            axis.barh(k, size, left=left, height=0.7, color=color, label=word if k == 0 else None)
            left += size
        axis.plot([stage.budget_bytes / 1e9] * 2, [k - 0.4, k + 0.4], color=TEXT, linewidth=1.5)
        layers = stage.layer_names
        names = layers[0] if len(layers) == 1 else f"{layers[0]} .. {layers[-1]}"
        axis.annotate(
            names, (left, k), (4, 0), textcoords="offset points", va="center", fontsize=7, color=FAINT, zorder=3,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # the line of the budget may cross it
        )  # fmt: skip
    labels = [f"{k}: {stage.device}" for k, stage in enumerate(plan.stages)]
    _dress(axis, labels, "GB at the peak (line: the device's budget)")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.7 / max(len(plan.stages), 2)), ncols=7, fontsize=7,
                frameon=False)  # fmt: skip


def _draw_timeline(axis: Any, plan: Plan) -> None:
    ranks = {name: rank for rank, name in enumerate(plan.devices)}
    timeline = plan.timeline().shifted()
    for rank in ranks.values():
        axis.barh(rank, timeline.makespan, height=0.8, color=IDLE, linewidth=0)
    for kind in sorted({span.kind for span in timeline.spans}):
        spans = [span for span in timeline.spans if span.kind == kind]
        rows = [ranks[plan.stages[span.stage].device] for span in spans]
        draw_bars(axis, spans, rows, 1.0, height=0.8, linewidth=0.3)
    axis.set_xlim(0, timeline.makespan)
    _dress(axis, list(ranks), "seconds of one run of the schedule, predicted")
    axis.legend(loc="lower right", fontsize=7, ncols=4, frameon=False, bbox_to_anchor=(1.0, 1.0))


def _draw_curves(axis: Any, plan: Plan) -> None:
    """Share of each device's budget over time."""
    end = plan.timeline().makespan
    budgets = {stage.device: stage.budget_bytes for stage in plan.stages}
    for name, curve in zip(plan.devices, memory_curve(plan)):
        times = [when for when, _ in curve] + [end]
        shares = [100 * held / budgets[name] for _, held in curve]
        peak = max(held for _, held in curve)
        label = f"{name}: peak {format_bytes(peak)} of {format_bytes(budgets[name])}"
        axis.step(times, [*shares, shares[-1]], where="post", linewidth=1.2, label=label)
    axis.axhline(100, color=TEXT, linewidth=1, linestyle=":")
    axis.set_ylim(0, 108)
    axis.set_xlim(0, end)
    axis.set_ylabel("% of the budget", fontsize=8, color=FAINT)
    axis.tick_params(labelsize=8, labelcolor=FAINT)
    axis.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3)
    axis.spines[["top", "right"]].set_visible(False)


def _dress(axis: Any, labels: list[str], what: str) -> None:
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0, labelsize=8, labelcolor=TEXT)
    axis.tick_params(axis="x", labelsize=8, labelcolor=FAINT)
    axis.set_xlabel(what, fontsize=8, color=FAINT)
    axis.spines[["top", "right", "left"]].set_visible(False)
