"""A pipeline by time: a row per stage, forwards and backwards coloured, idle time left visible."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spu.common.units import format_seconds
from spu.plan.show.colors import FAINT, FILL, IDLE, INK, OTHER_FILL, OTHER_INK, TEXT, WORDS
from spu.schedules import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_bars", "draw_timeline", "new_figure"]

WIDTH_INCHES, DPI = 12.0, 150
_ROW, _HEAD, _FOOT, _GAP = 0.46, 0.86, 0.62, 0.54  # inches
_LEFT, _RIGHT = 0.85, 0.95  # inches beside the rows
_BAR = 0.80  # share of a row that its bars fill
_FONT, _SMALLEST_FONT = 8.0, 5.5  # points, of the microbatch numbers
_DIGIT = 0.64  # width of a digit, as a share of the font's size


def draw_timeline(
    timeline: Timeline,
    path: str | os.PathLike[str],
    title: str = "pipeline",
    predicted: Timeline | None = None,
) -> None:
    """Draws a timeline as a picture; the file's ending decides the format (png, svg, pdf).

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
    figure, axes = _figure([panel.stages for _, panel in panels], names=predicted is not None)
    longest = max(panel.makespan for _, panel in panels)
    scale, unit = (1e3, "ms") if longest < 2.0 else (1.0, "s")
    for (name, panel), axis in zip(panels, axes, strict=True):
        _draw_panel(axis, panel, scale, longest, name)
    axes[-1].set_xlabel(f"time ({unit})", color=FAINT, fontsize=9)
    for axis in axes[:-1]:
        axis.tick_params(labelbottom=False)
    _draw_heading(figure, title, timeline, predicted)
    _draw_legend(figure, [panel for _, panel in panels])
    figure.savefig(os.fspath(path), dpi=DPI, facecolor="white")


def new_figure(height: float, **options: Any) -> Figure:
    """A figure on the Agg canvas, of this height in inches, without pyplot and its global state.

    Raises:
        ImportError: without matplotlib; says how to install it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'matplotlib>=3.8'") from error
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, **options)
    FigureCanvasAgg(figure)
    return figure


def draw_bars(axis: Any, spans: Sequence[Span], rows: Sequence[int], scale: float, **look: Any) -> None:
    """Bars for spans of one kind, each in its row; ``scale`` from seconds to the axis."""
    (kind,) = {span.kind for span in spans}
    axis.barh(
        rows,
        [span.seconds * scale for span in spans],
        left=[span.start * scale for span in spans],
        color=FILL.get(kind, OTHER_FILL),
        edgecolor="white",
        label=WORDS.get(kind, kind),
        **look,
    )


def _figure(stages: list[int], *, names: bool) -> tuple[Figure, list[Axes]]:
    """One panel per timeline, every row of the same height."""
    head = _HEAD + (0.22 if names else 0.0)
    height = head + _FOOT + _ROW * sum(stages) + _GAP * (len(stages) - 1)
    figure = new_figure(height)
    axes = []
    top = height - head
    for count in stages:
        rows = _ROW * count
        box = (_LEFT, top - rows, WIDTH_INCHES - _LEFT - _RIGHT, rows)
        axes.append(figure.add_axes((box[0] / WIDTH_INCHES, box[1] / height, box[2] / WIDTH_INCHES, box[3] / height)))
        top -= rows + _GAP
    return figure, axes


def _draw_panel(axis: Any, timeline: Timeline, scale: float, longest: float, name: str) -> None:
    """Rows of bars on a light ground; the ground that shows is idle time."""
    moved = timeline.shifted()
    points_per_second = (WIDTH_INCHES - _LEFT - _RIGHT) * 72 / longest
    for stage in range(moved.stages):
        axis.barh(stage, moved.makespan * scale, left=0.0, height=_BAR, color=IDLE, linewidth=0, zorder=1)
    for kind in sorted({span.kind for span in moved.spans}):
        spans = [span for span in moved.spans if span.kind == kind]
        draw_bars(axis, spans, [span.stage for span in spans], scale, height=_BAR, linewidth=0.6, zorder=2)
        _draw_numbers(axis, spans, scale, points_per_second, INK.get(kind, OTHER_INK))
    _dress(axis, moved, scale, longest, name)


def _draw_numbers(axis: Any, spans: list[Span], scale: float, points_per_second: float, ink: str) -> None:
    """The microbatch in each bar of one kind, as large as fits most of them; none where that is too small to read."""
    letters = max(len(str(span.microbatch)) for span in spans)
    typical = statistics.median(span.seconds for span in spans) * points_per_second
    size = min(_FONT, (typical - 2.0) / (_DIGIT * letters))
    if size < _SMALLEST_FONT:
        return
    for span in spans:
        text = str(span.microbatch)
        if span.seconds * points_per_second < size * _DIGIT * len(text) + 1.0:
            continue
        middle = (span.start + span.end) / 2 * scale
        axis.text(middle, span.stage, text, ha="center", va="center_baseline", fontsize=size, color=ink, zorder=3)


def _dress(axis: Any, timeline: Timeline, scale: float, longest: float, name: str) -> None:
    """Labels, ticks and limits; on the right how busy each stage was."""
    axis.set_xlim(0.0, longest * scale)
    axis.set_ylim(timeline.stages - 0.5, -0.5)
    axis.set_yticks(range(timeline.stages), [f"stage {stage}" for stage in range(timeline.stages)])
    axis.tick_params(axis="y", length=0, labelsize=9, labelcolor=TEXT)
    axis.tick_params(axis="x", color="#c5ccd4", labelsize=8, labelcolor=FAINT)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c5ccd4")
    for stage, busy in enumerate(timeline.busy):
        share = f"{100 * busy / timeline.makespan:.0f}% busy" if timeline.makespan else ""
        axis.annotate(
            share, (1.0, stage), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            va="center", fontsize=8, color=FAINT, annotation_clip=False,
        )  # fmt: skip
    if name:
        axis.set_title(
            f"{name}: {format_seconds(timeline.makespan)}, {100 * timeline.idle_share:.1f}% idle",
            loc="left", fontsize=9, color=TEXT, pad=5,
        )  # fmt: skip


def _draw_heading(figure: Any, title: str, timeline: Timeline, predicted: Timeline | None) -> None:
    height = figure.get_figheight()
    count = len({span.microbatch for span in timeline.spans})
    facts = [f"{timeline.stages} stages", f"{count} microbatches", format_seconds(timeline.makespan)]
    idle = f"{100 * timeline.idle_share:.1f}% idle"
    if predicted is not None:
        idle += f" measured, {100 * predicted.idle_share:.1f}% predicted"
    place = _LEFT / WIDTH_INCHES
    figure.text(place, 1 - 0.20 / height, title, va="top", fontsize=13, fontweight="bold", color=TEXT)
    figure.text(place, 1 - 0.50 / height, "  ·  ".join([*facts, idle]), va="top", fontsize=9, color=FAINT)


def _draw_legend(figure: Any, timelines: list[Timeline]) -> None:
    from matplotlib.patches import Patch

    kinds = {span.kind for timeline in timelines for span in timeline.spans}
    entries = [(WORDS[kind], FILL[kind]) for kind in WORDS if kind in kinds]
    entries += [(kind, OTHER_FILL) for kind in sorted(kinds - set(WORDS))]
    figure.legend(
        handles=[Patch(facecolor=color, label=word) for word, color in [*entries, ("idle", IDLE)]],
        loc="upper right",
        bbox_to_anchor=(1 - _RIGHT / WIDTH_INCHES, 1 - 0.47 / figure.get_figheight()),
        ncols=len(entries) + 1,
        frameon=False,
        fontsize=9,
        labelcolor=TEXT,
        handlelength=1.2,
        handleheight=1.0,
        borderpad=0,
        borderaxespad=0,
        columnspacing=1.4,
    )
