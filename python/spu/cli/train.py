"""The command ``spu train``: a new run or an old one, through the pipeline, the reference, or both."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from spu.cli.placed import planned_settings
from spu.common.files import read_object
from spu.common.launched import in_several_processes
from spu.common.options import AUTO
from spu.cost.blueprint import config_names
from spu.plan import Plan
from spu.train import plain as reference
from spu.train import report
from spu.train.config import PLACEMENT, RunOptions, TrainConfig, for_tokens_per_step, option
from spu.train.defaults import with_defaults
from spu.train.job import Job
from spu.train.loop import pipeline, train
from spu.train.ranks import check_not_elsewhere, follow, leading
from spu.train.results import draw_losses, is_finished
from spu.train.resume import resume_config
from spu.train.run_folder import find_folder, new_folder
from spu.train.signals import Stopped, StopSignals

__all__ = ["train_command"]


def train_command(given: dict[str, Any], options: RunOptions, named: Collection[str] | None = None) -> Path:
    """Start or go on with a run and print its result.

    Args:
        given: settings of ``TrainConfig`` named by the user.
        options: what else was named.
        named: those that stand on the command line itself, not in a file; None for all.

    Returns:
        The run's folder.

    Raises:
        ValueError: bad input; the text names the value and the fix, and nothing was written over.
        Stopped: Ctrl-C or SIGTERM; what could be saved is saved.
    """
    named = set(given) if named is None else named
    if not in_several_processes():
        if given.get("engine") == "distributed":
            raise ValueError(
                "--engine distributed runs in processes that torchrun starts, as in torchrun --nproc-per-node 2 -m spu "
                "train ...; this one was started alone: give --engine local, or leave it out"
            )
        return _train(given if "engine" in given else {**given, "engine": "local"}, options, named)
    with leading(int(given.get("wait_s", TrainConfig().wait_s))) as leads:
        if not leads:
            follow(pipeline)
            return Path()
        if options.reference or options.compare:
            raise ValueError("--reference and --compare train in one process: leave torchrun out, or the option")
        if given.get("engine") == "local":
            raise ValueError("--engine local is of one process, and torchrun has started several: leave one out")
        return _train({**given, "engine": "distributed"}, options, named)


def _train(given: dict[str, Any], options: RunOptions, named: Collection[str]) -> Path:
    only_reference = options.reference and not options.compare
    plan = None if options.plan is None else Plan.load(options.plan)
    if plan is not None:
        given = planned_settings(plan, given, str(options.plan))
    job = _make_job(given, options, named)
    job.given_plan = plan if job.new else None
    job.sample, job.tensorboard = options.sample, options.tensorboard
    job.read()
    if only_reference and job.config.planned_steps() is None:
        raise ValueError(f"--minutes {job.config.minutes} is measured on the pipeline: give --steps or --tokens here")
    try:
        with StopSignals() as signals:
            if not only_reference:
                summary = _pipeline(job, signals)
            if options.compare or only_reference:
                if signals.asked is not None:
                    raise Stopped("stopped before the reference; --resume with --compare goes on")
                result = _reference(job, signals)
                print(f"plain fp32: validation loss {result['val_loss']:.4f}, {result['tokens_per_s']:,.0f} tokens/s")
            if options.compare:
                draw_losses(job, summary)
                print("\n".join(report.comparison_lines(summary, result)))
    finally:
        job.folder.unlock()
    return job.folder.path


def _make_job(given: dict[str, Any], options: RunOptions, named: Collection[str]) -> Job:
    out, name, resume = options.out, options.name, options.resume
    if resume == AUTO:
        if name is None:
            raise ValueError("--resume auto needs the run's --name: it goes on with that run, or begins it")
        begun = Path(out) / name / "config.json"
        exists = begun.exists()
        if not exists and in_several_processes():
            check_not_elsewhere(begun)
        resume, name = (name, None) if exists else (None, name)
        if exists:  # the run has turned them into steps
            given = {key: value for key, value in given.items() if key != "minutes"}
    if resume is None:
        given = with_defaults(given)
    if options.tokens_per_step is not None:
        given = _with_step(given, options, resume)
    if resume is None:
        if given.get("model") is not None and given["model"] not in config_names():  # a run is resumed from any folder
            given = {**given, "model": str(Path(given["model"]).resolve())}
        for key in ("data", "val_data"):
            if given.get(key) is not None:
                given = {**given, key: tuple(str(Path(path).resolve()) for path in given[key])}
        return Job(TrainConfig(**given), new_folder(out, name), new=True)
    if name is not None:
        raise ValueError(f"--name {name} and --resume {resume}: a resumed run keeps its name, leave --name out")
    if options.plan is not None and options.resume != AUTO:
        raise ValueError(f"--plan {options.plan} and --resume {resume}: a resumed run keeps its plan, leave --plan out")
    folder = find_folder(out, resume)
    saved, corpus = folder.read_config()
    config = resume_config(saved, given)
    # Naming devices or budgets asks for a new plan, as on another machine; a file that has begun the run does not.
    replaced = any(key in named or getattr(config, key) != getattr(saved, key) for key in PLACEMENT if key in given)
    steps = saved.planned_steps()
    return Job(
        config,
        folder,
        new=False,
        replaced=replaced,
        lengthened=config.planned_steps() not in (None, steps),
        saved_steps=steps,
        saved_corpus=corpus,
    )


def _with_step(given: dict[str, Any], options: RunOptions, resume: str | None) -> dict[str, Any]:
    """Return the settings with the step's size from --tokens-per-step, and say what they are."""
    tokens = options.tokens_per_step
    assert tokens is not None
    config = TrainConfig(**given) if resume is None else find_folder(options.out, resume).read_config()[0]
    step = for_tokens_per_step(config, tokens)
    one = config.parts // config.accumulate
    parts = step["accumulate"] * step.get("microbatches", one)
    print(
        f"a step of {step['batch'] * config.seq:,} tokens: {step['batch']} sequences in {parts} microbatches "
        f"({' '.join(f'{option(name)} {value}' for name, value in step.items())})",
        flush=True,
    )
    return {**given, **step}


def _pipeline(job: Job, signals: StopSignals) -> dict[str, Any]:
    """Train, or take the summary of a run that is complete."""
    finished = {} if job.new else read_object(job.folder / "summary.json")
    steps = job.config.planned_steps()
    if finished and finished.get("planned_steps", finished.get("steps")) == steps and is_finished(finished):
        print(f"run {job.folder.name} is complete; --steps with a larger number goes on")
    else:
        finished = train(job, signals)
    print("\n".join(report.summary_lines(finished, job.folder.path)), flush=True)
    return finished


def _reference(job: Job, signals: StopSignals) -> dict[str, Any]:
    """Train the reference, or take its result if it is there."""
    known = read_object(job.folder / reference.RESULT)
    if known.get("key") == reference.reference_key(job.config, job.corpus):
        print(f"the reference of {job.folder.name} is there already")
        return known
    job.open_folder()
    return reference.train_reference(job.config, job.corpus, job.folder, signals)
