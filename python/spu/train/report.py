"""The picture of a run's losses, and the lines printed at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spu.common.files import naming
from spu.train.metrics import train_rows, validation_rows
from spu.train.progress import RunningMean

__all__ = ["comparison_lines", "difference_percent", "draw_loss", "summary_lines"]

_TRAIN, _VALIDATION, _REFERENCE, _SKIPPED = "#4c78a8", "#d1495b", "#8d8d8d", "#f2a541"


def draw_loss(
    path: Path,
    title: str,
    rows: list[dict[str, Any]],
    *,
    unit: str = "byte",
    final_val: float | None = None,
    reference: list[dict[str, Any]] | None = None,
) -> None:
    """Draw training and validation loss over tokens, with the reference's validation beside them, as a PNG.

    Args:
        path: the picture.
        title: above it.
        rows: of metrics.jsonl.
        unit: of a token: "byte" or "token".
        final_val: loss on the whole validation set.
        reference: rows of the reference's metrics.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    try:
        steps = [row for row in train_rows(rows) if row["loss"] is not None]
        tokens = {row["step"]: row["tokens"] for row in steps}
        axes.plot([r["tokens"] for r in steps], [r["loss"] for r in steps], color=_TRAIN, alpha=0.25, linewidth=0.8)
        axes.plot([r["tokens"] for r in steps], _smoothed(steps), color=_TRAIN, linewidth=1.6, label="training")
        if reference:
            points = _points(reference, {row["step"]: row["tokens"] for row in train_rows(reference)})
            axes.plot(
                *points, color=_REFERENCE, linestyle="--", marker="x", markersize=5, label="validation, plain fp32"
            )
        axes.plot(*_points(rows, tokens), color=_VALIDATION, marker="o", markersize=4, label="validation")
        if final_val is not None:
            label = f"whole validation set: {final_val:.3f}"
            axes.axhline(final_val, color=_VALIDATION, linewidth=0.8, linestyle=":", label=label)
        skipped = [row["tokens"] for row in steps if row.get("skipped")]
        if skipped:
            bottom = axes.get_xaxis_transform()  # x in tokens, y as a share of the axis
            heights = [0.02] * len(skipped)
            axes.plot(skipped, heights, "^", transform=bottom, color=_SKIPPED, markersize=6, label="skipped step")
        axes.set_xlabel("training tokens")
        axes.set_ylabel(f"loss, nats a {unit}")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f}k" if value >= 1000 else f"{value:.0f}")
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.tight_layout()
        with naming(path):
            figure.savefig(path)
    finally:
        pyplot.close(figure)


def _smoothed(rows: list[dict[str, Any]]) -> list[float]:
    mean = RunningMean()
    return [mean.add(row["loss"]) for row in rows]


def _points(rows: list[dict[str, Any]], tokens: dict[int, int]) -> tuple[list[int], list[float]]:
    points = [row for row in validation_rows(rows) if row["val_loss"] is not None and row["step"] in tokens]
    return [tokens[row["step"]] for row in points], [row["val_loss"] for row in points]


def difference_percent(val_loss: float, reference: float) -> float:
    """Return how much higher (+) or lower (-) the pipeline's validation loss is, in percent of the reference's."""
    return 100.0 * (val_loss - reference) / reference


def comparison_lines(summary: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """Return the pipeline beside plain fp32: validation loss, speed, relative difference."""
    ours, theirs = summary["val_loss"], reference["val_loss"]
    return [
        f"spu        validation {ours:.4f}  {summary['tokens_per_s']:,.0f} tokens/s",
        f"plain fp32 validation {theirs:.4f}  {reference['tokens_per_s']:,.0f} tokens/s",
        f"difference {difference_percent(ours, theirs):+.2f}% in validation loss, "
        f"{summary['tokens_per_s'] / reference['tokens_per_s']:.2f}x the speed",
    ]


def summary_lines(summary: dict[str, Any], folder: Path) -> list[str]:
    """Return the lines that are printed at the end of a run."""
    whole, trained = summary["parameters"], summary.get("trained_parameters", summary["parameters"])
    share = "" if trained == whole else f"{trained / 1e6:.2f}M of "
    lines = [
        f"trained {share}{whole / 1e6:.2f}M parameters on {summary['tokens']:,} tokens of {summary['corpus']} "
        f"in {summary['seconds']:.0f} s: {summary['tokens_per_s']:,.0f} tokens/s",
        f"validation loss {_number(summary['val_loss'])} nats a {summary['unit']}{_perplexity(summary)}, "
        f"{summary['skipped']} skipped steps, final loss scale {_number(summary['loss_scale'], 'g')}",
    ]
    if summary.get("exported_step", summary.get("steps")) != summary.get("steps"):
        lines.append(f"these are the best weights, of step {summary['exported_step']} of {summary['steps']}")
    guess = summary.get("guess_loss")
    if guess is not None and summary["val_loss"] is not None and summary["val_loss"] >= guess:
        lines.append(
            f"that is no better than guessing ({guess:.4f}): the model has learned nothing, try a smaller --lr"
        )
    if summary.get("idle_share") is not None:
        lines.append(
            f"pipeline idle {summary['idle_share']:.1%} of a step (median of the last steps); the simulator predicts "
            f"{summary['predicted_idle_share']:.1%}"
        )
    if summary.get("sample"):
        lines += [
            "",
            "sample:",
            *("  " + line for line in (summary["prompt"] + "|" + summary["sample"]).splitlines()),
            "",
        ]
    names = ("loss.png", "timeline.png", "trace.json", "model", "adapter", "checkpoint")
    pictures = [name for name in names if (folder / name).exists()]
    return [*lines, f"in {folder}: {', '.join(pictures)}"]


def _perplexity(summary: dict[str, Any]) -> str:
    value = summary.get("perplexity")
    return "" if value is None else f" (perplexity {value:.4g} a {summary['unit']})"


def _number(value: float | None, form: str = ".4f") -> str:
    return "not finite" if value is None else format(value, form)
