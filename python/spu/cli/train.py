"""The command ``spu train``: a new run or an old one, through the pipeline, the reference, or both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spu.cli.placed import planned_settings
from spu.cost.blueprint import config_names
from spu.plan import Plan
from spu.train import plain as reference
from spu.train import report
from spu.train.config import PLACEMENT, RunOptions, TrainConfig, resume_config
from spu.train.job import Job
from spu.train.loop import train
from spu.train.results import draw_losses
from spu.train.run_folder import find_folder, new_folder
from spu.train.signals import Stopped, StopSignals

__all__ = ["train_command"]


def train_command(given: dict[str, Any], options: RunOptions) -> Path:
    """Start or go on with a run and print its result.

    Args:
        given: settings of ``TrainConfig`` named by the user.
        options: what else was named.

    Returns:
        The run's folder.

    Raises:
        ValueError: bad input; the text names the value and the fix, and nothing was written over.
        Stopped: Ctrl-C or SIGTERM; what could be saved is saved.
    """
    plan, resume = options.plan, options.resume
    only_reference = options.reference and not options.compare
    chosen = None if plan is None else Plan.load(plan)
    if chosen is not None and resume is not None:
        raise ValueError(f"--plan {plan} and --resume {resume}: a resumed run keeps its plan, leave --plan out")
    if chosen is not None:
        given = planned_settings(chosen, given, str(plan))
    job = _make_job(given, options.out, options.name, resume)
    job.given_plan, job.sample = chosen, options.sample
    job.read()
    if only_reference and job.config.planned_steps() is None:
        raise ValueError(f"--minutes {job.config.minutes} is measured on the pipeline: give --steps or --tokens here")
    try:
        with StopSignals() as signals:
            if not only_reference:
                summary = _pipeline(job, signals)
            if options.compare or only_reference:
                _stop_if_asked(signals)
                result = _reference(job, signals)
                print(f"plain fp32: validation loss {result['val_loss']:.4f}, {result['tokens_per_s']:,.0f} tokens/s")
            if options.compare:
                draw_losses(job, summary)
                print("\n".join(report.comparison_lines(summary, result)))
    finally:
        job.folder.unlock()
    return job.folder.path


def _make_job(given: dict[str, Any], out: str, name: str | None, resume: str | None) -> Job:
    if resume is None:
        for key in ("model", "data"):  # a run is resumed from any folder
            if given.get(key) is not None and given[key] not in config_names():
                given = {**given, key: str(Path(given[key]).resolve())}
        return Job(TrainConfig(**given), new_folder(out, name), new=True)
    if name is not None:
        raise ValueError(f"--name {name} and --resume {resume}: a resumed run keeps its name, leave --name out")
    folder = find_folder(out, resume)
    saved, corpus = folder.read_config()
    config = resume_config(saved, given)
    replaced = any(key in given for key in PLACEMENT)  # naming them asks for a new plan, as on another machine
    lengthened = config.planned_steps() != saved.planned_steps()
    return Job(config, folder, new=False, replaced=replaced, lengthened=lengthened, saved_corpus=corpus)


def _pipeline(job: Job, signals: StopSignals) -> dict[str, Any]:
    """Train, or take the summary of a run that is complete."""
    finished = None if job.new else _load(job.folder / "summary.json")
    if finished is not None and finished.get("steps") == job.config.planned_steps():
        print(f"run {job.folder.name} is complete; --steps with a larger number goes on")
    else:
        finished = train(job, signals)
    print("\n".join(report.summary_lines(finished, job.folder.path)), flush=True)
    return finished


def _reference(job: Job, signals: StopSignals) -> dict[str, Any]:
    """Train the reference, or take its result if it is there."""
    known = _load(job.folder / reference.RESULT)
    if known is not None and known.get("key") == reference.reference_key(job.config, job.corpus):
        print(f"the reference of {job.folder.name} is there already")
        return known
    job.open_folder()
    return reference.train_reference(job.config, job.corpus, job.folder, signals)


def _stop_if_asked(signals: StopSignals) -> None:
    if signals.asked is not None:
        raise Stopped(signals.asked, "stopped before the reference; --resume with --compare goes on")


def _load(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
