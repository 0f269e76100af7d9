"""The results of a run in its folder: the summary's numbers, and pictures of its losses and its pipeline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spu.plan import draw_timeline, write_trace
from spu.schedules import Timeline
from spu.train import plain
from spu.train.evaluate import perplexity
from spu.train.job import Job
from spu.train.metrics import read_metrics, train_rows
from spu.train.model import load_config
from spu.train.report import draw_loss
from spu.trainer.trainer import ModelParallelTrainer

__all__ = ["draw_losses", "is_finished", "stopped_summary", "summarise"]


def is_finished(summary: dict[str, Any]) -> bool:
    """Tell whether a summary.json is that of a run that has come to its end."""
    return bool(summary.get("finished", True))  # those of before had no such line, and were written at the end alone


def stopped_summary(job: Job, step: int, signal_name: str, saved: bool) -> dict[str, Any]:
    """Return the numbers of summary.json for a run that a signal has stopped after ``step``."""
    return {
        "run": job.folder.name,
        "finished": False,
        "stopped_by": signal_name,
        "steps": step,
        "planned_steps": job.config.planned_steps(),
        "saved": saved,
    }


def summarise(
    job: Job,
    trainer: ModelParallelTrainer,
    parameters: int,
    val_loss: float,
    timelines: Sequence[Timeline],
    steps: int,
    exported_step: int,
) -> dict[str, Any]:
    """Return the numbers of summary.json, and draw the pipeline.

    Args:
        job: the run.
        trainer: with the weights that are exported.
        parameters: how many the model has.
        val_loss: on the whole validation set.
        timelines: of the last steps; none where no step ran in this process.
        steps: done.
        exported_step: after which the weights were as they are exported.
    """
    config = job.config
    rows = train_rows(read_metrics(job.folder.metrics))
    tokens = [row["tokens"] for row in rows]
    each = [after - before for before, after in zip([0, *tokens], tokens)]
    seconds = sum(own / row["tokens_per_s"] for own, row in zip(each, rows))
    summary: dict[str, Any] = {
        "run": job.folder.name,
        "finished": True,
        "corpus": job.corpus.name,
        "unit": job.unit,
        "parameters": parameters,
        "trained_parameters": sum(p.numel() for p in trainer.parameters() if p.requires_grad),
        "steps": steps,
        "planned_steps": config.planned_steps(),
        "exported_step": exported_step,
        "tokens": tokens[-1],
        "seconds": seconds,
        "tokens_per_s": tokens[-1] / seconds,
        "val_loss": val_loss,
        "perplexity": perplexity(val_loss),
        "guess_loss": math.log(load_config(config.model).get_text_config().vocab_size),
        "skipped": sum(bool(row["skipped"]) for row in rows),
        "loss_scale": rows[-1]["loss_scale"],
        "precision": config.precision,
        "transfer": config.transfer,
    }
    return summary | _draw_pipeline(job, trainer, timelines)


def _draw_pipeline(job: Job, trainer: ModelParallelTrainer, timelines: Sequence[Timeline]) -> dict[str, Any]:
    """Write timeline.png and trace.json of the step of median duration, if steps ran in this process.

    Return the median idle share, measured and predicted.
    """
    if not timelines:
        return {}
    typical = sorted(timelines, key=lambda timeline: timeline.makespan)[len(timelines) // 2]
    predicted = trainer.predicted_timeline()
    assert trainer.plan is not None
    how = f"{trainer.plan.settings.schedule}, {trainer.plan.settings.microbatches_in_words}"
    title = f"{job.folder.name}: a typical step's pipeline, {how}"
    draw_timeline(typical, job.folder / "timeline.png", title, predicted)
    write_trace(typical, job.folder / "trace.json")
    idle_share = statistics.median(timeline.idle_share for timeline in timelines)
    return {"idle_share": idle_share, "predicted_idle_share": predicted.idle_share}


def draw_losses(job: Job, summary: dict[str, Any]) -> None:
    """Draw loss.png from the metrics in the folder, with the reference's curve if there is one."""
    config = job.config
    draw_loss(
        job.folder / "loss.png",
        f"{summary['parameters'] / 1e6:.1f}M parameters, {config.precision}, {Path(summary['corpus']).name}",
        read_metrics(job.folder.metrics),
        unit=job.unit,
        final_val=summary["val_loss"],
        reference=read_metrics(job.folder / plain.METRICS),
    )
