"""Pictures: a timeline, with idle time left visible; and a plan, as bytes, timeline, and memory over time."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spu.common.files import naming
from spu.common.units import format_bytes, format_seconds
from spu.plan.show.colors import FAINT, FILL, IDLE, INK, OTHER_FILL, OTHER_INK, TEXT, WORDS
from spu.plan.show.curve import memory_curve
from spu.plan.visits import RESOURCES
from spu.schedules import Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spu.plan.plan import Plan
    from spu.plan.streaming import StreamingPlan
    from spu.plan.visits import Busy

__all__ = ["draw_plan", "draw_timeline"]

WIDTH_INCHES, DPI = 12.0, 150
_ROW = 0.46  # inches
_BAR = 0.80  # share of a row that its bars fill
_FONT, _SMALLEST_FONT = 8.0, 5.5  # points, of the microbatch numbers
_DIGIT = 0.64  # width of a digit, as a share of the font's size

_CATEGORIES = {
    "param_bytes": ("weights", "#4c78a8"),
    "main_grad_bytes": ("main gradients", "#72b7b2"),
    "master_bytes": ("masters", "#9ecae9"),
    "moment_bytes": ("moments", "#b6a6ca"),
    "saved_bytes": ("activations", "#f2a541"),
    "wire_bytes": ("wires", "#d1495b"),
    "workspace_bytes": ("workspace", "#c5ccd4"),
}


def draw_timeline(
    timeline: Timeline, path: str | os.PathLike[str], title: str = "pipeline", predicted: Timeline | None = None
) -> None:
    """Draw a timeline as a picture; the file's ending decides the format (png, svg, pdf).

    Args:
        timeline: measured, or predicted if it is the only one.
        path: file to write.
        title: the picture's heading.
        predicted: the simulator's timeline, drawn below on the same scale of time.

    Raises:
        ValueError: for a timeline without spans.
        ImportError: without matplotlib; says how to install it.
    """
    panels = [("", timeline)] if predicted is None else [("measured", timeline), ("predicted", predicted)]
    for name, panel in panels:
        if not panel.spans:
            raise ValueError(f"the {name or 'given'} timeline has no spans; there is nothing to draw")
    stages = [panel.stages for _, panel in panels]
    figure = _new_figure(0.7 + sum(_ROW * count + 0.5 for count in stages))
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=stages)[:, 0]
    longest = max(panel.makespan for _, panel in panels)
    scale, unit = (1e3, "ms") if longest < 2.0 else (1.0, "s")
    for (name, panel), axis in zip(panels, axes, strict=True):
        last = axis is axes[-1]
        _draw_rows(axis, panel, range(panel.stages), longest, scale, numbers=True)
        _dress(axis, [f"stage {stage}" for stage in range(panel.stages)], f"time ({unit})" if last else "")
        axis.tick_params(labelbottom=last)
        what = f"{name}: " if name else ""
        text = f"{what}{format_seconds(panel.makespan)}, {100 * panel.idle_share:.1f}% idle"
        axis.set_title(text, loc="left", fontsize=9, color=TEXT)
        for stage, busy in enumerate(panel.busy):
            share = f" {100 * busy / panel.makespan:.0f}% busy" if panel.makespan else ""
            axis.text(longest * scale, stage, share, va="center", fontsize=8, color=FAINT)
    count = len({span.microbatch for span in timeline.spans})
    _head(figure, f"{title}: {timeline.stages} stages, {count} microbatches")
    handles = {label: bar for axis in axes for bar, label in zip(*axis.get_legend_handles_labels())}
    axes[0].legend(handles.values(), handles, loc="lower right", ncols=9, **_legend(1.0))
    with naming(path):
        figure.savefig(os.fspath(path), facecolor="white")


def draw_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Draw a plan: what lies where, the predicted timeline, and memory over time under the budgets.

    Raises:
        ImportError: without matplotlib; says how to install it.
    """
    count, streaming = len(plan.devices), plan.streaming
    moving = [] if streaming is None else [name for name in RESOURCES[1:] if streaming.seconds[name]]
    bars = len(plan.stages) if streaming is None else len(streaming.tiers)
    heights = [0.5 + _ROW * bars, 0.5 + _ROW * (count + len(moving)), 1.2 + 0.5 * count]
    figure = _new_figure(sum(heights) + 1.5)
    top, middle, bottom = figure.subplots(3, 1, height_ratios=heights)
    p, s = plan.predicted, plan.settings
    step = f"{format_seconds(p.step_s)} a step, {100 * p.idle_share:.0f}% idle ({p.basis})"
    _head(figure, f"{plan.model or 'plan'}: {s.schedule}, {s.microbatches_in_words}, {s.precision}; {step}")
    if streaming is None:
        _draw_bytes(top, plan)
    else:
        _draw_tiers(top, streaming)
    ranks = {name: rank for rank, name in enumerate(plan.devices)}
    timeline = plan.timeline()
    _draw_rows(middle, timeline, [ranks[stage.device] for stage in plan.stages], timeline.makespan, 1.0)
    steps = [] if streaming is None else streaming.busy(s.run_microbatches)
    for row, name in enumerate(moving, count):
        _draw_moving(middle, row, [busy for busy in steps if busy.resource == name])
    _dress(middle, [*ranks, *moving], "seconds of one run of the schedule, predicted")
    middle.legend(loc="lower right", ncols=5, **_legend(1.0))
    _draw_curves(bottom, plan)
    with naming(path):
        figure.savefig(os.fspath(path), facecolor="white")


def _new_figure(height: float) -> Figure:
    """Return a figure on the Agg canvas, of this height in inches, without pyplot and its global state.

    Raises:
        ImportError: without matplotlib; says how to install it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'matplotlib>=3.8'") from error
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _head(figure: Figure, text: str) -> None:
    figure.suptitle(text, color=TEXT, fontsize=12, fontweight="bold", x=0.01, ha="left")


def _legend(x: float) -> dict[str, Any]:
    return {"fontsize": 7, "frameon": False, "bbox_to_anchor": (x, 1.0), "borderaxespad": 0.2}


def _draw_rows(
    axis: Any, timeline: Timeline, rows: Sequence[int], end: float, scale: float, *, numbers: bool = False
) -> None:
    """Draw each stage's bars in its row on a light ground; the ground that shows is idle time.

    Args:
        rows: the row of each stage.
        end: seconds at the axis's right end.
        scale: from seconds to the axis.
        numbers: write the microbatch into the bars.
    """
    timeline = timeline.shifted()
    for row in sorted(set(rows)):
        axis.barh(row, timeline.makespan * scale, height=_BAR, color=IDLE, linewidth=0, label="idle" * (row == 0))
    for kind in sorted({span.kind for span in timeline.spans}):
        spans = [span for span in timeline.spans if span.kind == kind]
        axis.barh(
            [rows[span.stage] for span in spans],
            [span.seconds * scale for span in spans],
            left=[span.start * scale for span in spans],
            height=_BAR,
            color=FILL.get(kind, OTHER_FILL),
            edgecolor="white",
            linewidth=0.4,
            label=WORDS.get(kind, kind),
        )
        if not numbers:
            continue
        points_per_second = (WIDTH_INCHES - 1.8) * 72 / end
        letters = max(len(str(span.microbatch)) for span in spans)
        typical = statistics.median(span.seconds for span in spans) * points_per_second
        size = min(_FONT, (typical - 2.0) / (_DIGIT * letters))
        for span in spans if size >= _SMALLEST_FONT else ():
            text, middle = str(span.microbatch), (span.start + span.end) / 2 * scale
            if span.seconds * points_per_second >= size * _DIGIT * len(text) + 1.0:
                look = {"fontsize": size, "color": INK.get(kind, OTHER_INK)}
                axis.text(middle, rows[span.stage], text, ha="center", va="center_baseline", **look)
    axis.set_xlim(0.0, end * scale)


def _draw_bytes(axis: Any, plan: Plan) -> None:
    """Draw a bar per stage of what it holds at its peak, by category, and the budget of its device as a line."""
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
    axis.legend(loc="lower left", ncols=7, **_legend(0.0))


def _draw_tiers(axis: Any, streaming: StreamingPlan) -> None:
    """Draw a bar per tier of what it holds at its peak, and its budget as a line."""
    for k, tier in enumerate(streaming.tiers):
        peak, budget = tier.peak_bytes / 1e9, tier.budget_bytes / 1e9
        axis.barh(k, peak, height=0.7, color=_CATEGORIES["param_bytes"][1])
        axis.plot([budget] * 2, [k - 0.4, k + 0.4], color=TEXT, linewidth=1.5)
        text = f"{format_bytes(tier.peak_bytes)} of {format_bytes(tier.budget_bytes)}"
        axis.annotate(text, (0, k), (4, 0), textcoords="offset points", va="center", fontsize=7, color=INK["F"])
    _dress(axis, [tier.name for tier in streaming.tiers], "GB at the peak (line: the tier's budget)")


def _draw_moving(axis: Any, row: int, spans: Sequence[Busy]) -> None:
    """Draw what a link, a disk or the host does in its row."""
    widths = [span.end - span.start for span in spans]
    axis.barh(row, widths, left=[span.start for span in spans], height=_BAR, color=OTHER_FILL, linewidth=0)


def _draw_curves(axis: Any, plan: Plan) -> None:
    """Draw the share of each device's budget over time."""
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
    axis.legend(loc="lower left", ncols=3, **_legend(0.0))
    axis.spines[["top", "right"]].set_visible(False)


def _dress(axis: Any, labels: list[str], what: str) -> None:
    """Label rows and axis, and leave all other lines out."""
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0, labelsize=8, labelcolor=TEXT)
    axis.tick_params(axis="x", labelsize=8, labelcolor=FAINT)
    axis.set_xlabel(what, fontsize=8, color=FAINT)
    axis.spines[["top", "right", "left"]].set_visible(False)
