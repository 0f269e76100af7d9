"""A run of `spu train`: from settings to a trained model, its checkpoint and its records."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spu.checkpoint import writing as checkpoint
from spu.devices.manager import DeviceManager
from spu.optim.adamw import AdamW
from spu.plan import Plan, draw_timeline, write_trace
from spu.precision import LossScaler
from spu.schedules import Timeline
from spu.settings import TrainSettings
from spu.train import plain as reference
from spu.train import progress as console
from spu.train import report
from spu.train.config import TrainConfig
from spu.train.data import Corpus, make_corpus
from spu.train.export import free_memory, sample_of, save_model, take_exact
from spu.train.guard import Guard
from spu.train.metrics import MetricsFile, last_saved, read_metrics, save_result, train_rows
from spu.train.model import Tokenizer, load_config, make_model, make_tokenizer
from spu.train.run_folder import RunFolder
from spu.train.signals import Stopped, StopSignals
from spu.trainer.trainer import ModelParallelTrainer, StepResult

TIMELINES = 50  # last steps among which the typical one is looked for: any single step may have been disturbed


@dataclass
class Job:
    """One run and what has become of it so far."""

    config: TrainConfig
    folder: RunFolder
    new: bool
    replaced: bool = False  # placed on other devices than before
    lengthened: bool = False  # given more steps than before
    sample: bool = True  # let the trained model write a few lines
    saved_corpus: dict[str, Any] | None = None
    given_plan: Plan | None = None  # of a file that the user named
    corpus: Corpus = field(init=False)
    tokenizer: Tokenizer = field(init=False)
    view: console.View | None = None  # while training

    def say(self, text: str) -> None:
        """Show some lines beside the progress."""
        (print if self.view is None else self.view.say)(text)

    def read(self) -> None:
        """Read the text and check that it and the model fit together.

        Raises:
            ValueError: bad settings, data or model; nothing was written.
        """
        model_config = load_config(self.config.model)
        self.tokenizer = make_tokenizer(self.config.model, model_config)
        self._check_plan(model_config.get_text_config())
        longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and self.config.seq > longest:
            source = f"the plan was made for {self.given_plan.model}: " if self.given_plan is not None else ""
            raise ValueError(
                f"{source}--seq {self.config.seq} is longer than the model's {longest} positions: "
                f"give {longest} or less"
            )
        self.corpus = make_corpus(self.config.data, self.tokenizer, self.config.seq, self.say)
        top = max(int(part.max()) for part in (self.corpus.train, self.corpus.validation))
        if top >= model_config.get_text_config().vocab_size:
            raise ValueError(
                f"--model {self.config.model}: its tokenizer gives token {top}, its vocabulary has "
                f"{model_config.get_text_config().vocab_size}; give files that belong together"
            )
        saved = self.saved_corpus
        if saved is not None and saved["sha256"] != self.corpus.sha256:
            raise ValueError(
                f"--data {self.corpus.name} has changed since the run began: put it back, or start a new run"
            )

    def _check_plan(self, model_config: Any) -> None:
        """Raises ValueError if the plan that the user named is another model's."""
        plan = self.given_plan
        if plan is None:
            return
        layers, here = plan.stages[-1].layers[1], model_config.num_hidden_layers + 2
        if layers != here:
            raise ValueError(
                f"--plan was made for {plan.model}, of {layers} layers with embedding and head; --model has {here}: "
                "give the model that it was made for, or plan again with spu plan --model"
            )

    @property
    def corpus_record(self) -> dict[str, Any]:
        return {"name": self.corpus.name, "sha256": self.corpus.sha256}

    @property
    def unit(self) -> str:
        return "byte" if self.tokenizer.name == "bytes" else "token"

    def plan(self) -> Plan | None:
        """The plan a run was begun with, so that going on changes no bit; None for a new one or another placement."""
        if self.given_plan is not None:
            return self.given_plan
        file = self.folder / "plan.json"
        return None if self.new or self.replaced or not file.exists() else Plan.load(file)

    def open_folder(self) -> None:
        if self.new:
            self.folder.create(self.config, self.corpus_record)
            self.new = False
        else:
            self.folder.lock()


def make_trainer(job: Job, model: nn.Module) -> ModelParallelTrainer:
    """The pipeline for a run, planned and placed.

    Raises:
        ValueError: unknown device, more stages than layers, no placement under the budgets, unknown settings.
    """
    config, plan = job.config, job.plan()
    trainer = ModelParallelTrainer(
        model,
        DeviceManager(config.budget).get_devices(config.devices),
        optimizer=partial(AdamW, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay),
        lr_schedule=lambda step: job.config.lr_factor(step),
        settings=TrainSettings.part_of(config),
        replan=config.replan and plan is None,
        plan=plan,
        measure=plan is None or plan is job.given_plan,  # so that predicted times are of these layers here
        report=job.say,
        scaler=LossScaler(
            init_scale=config.init_scale, growth_interval=config.growth_interval, enabled=config.precision == "fp16"
        ),
    )
    try:
        trainer.prepare(*job.corpus.batch(config.seed, 0, config.batch, config.seq))
    except BaseException:
        trainer.close()
        raise
    return trainer


def settle_steps(job: Job, trainer: ModelParallelTrainer) -> None:
    """Turn `minutes` into a number of steps by timing a few that update nothing; afterwards it is fixed for good."""
    config = job.config
    if config.planned_steps() is not None:
        return
    assert config.minutes is not None
    batch = job.corpus.batch(config.seed, 0, config.batch, config.seq)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        trainer.forward_backward(*batch, keep_outputs=False)
        times.append(time.perf_counter() - begin)
    steps = max(1, int(config.minutes * 60 / (1.05 * statistics.median(times[1:]))))  # 5% for the update
    job.config = dataclasses.replace(config, steps=steps, minutes=None)


def evaluate(trainer: ModelParallelTrainer, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean loss over all targets of `batches`, on the pipeline."""
    total = sum(trainer.evaluate(x, y) * y.numel() for x, y in batches)
    return total / sum(y.numel() for _, y in batches)


def train(job: Job, signals: StopSignals) -> dict[str, Any]:
    """Train a run through the pipeline, from its start or its checkpoint, to its end.

    Returns:
        The summary, which is also in summary.json.

    Raises:
        Stopped: a signal asked for it; the checkpoint is of the last step done.
        ValueError: see `make_trainer`, `Guard` and `CheckpointError`; an existing checkpoint is left as it was.
    """
    model = make_model(job.config.model, job.config.seed).train()
    parameters = sum(p.numel() for p in model.parameters())
    with make_trainer(job, model) as trainer:
        done = 0 if job.new else _resume(job, trainer)
        settle_steps(job, trainer)
        fresh = job.new
        job.open_folder()
        if fresh or done == 0 or job.lengthened:
            job.folder.write_config(job.config, job.corpus_record)  # `minutes` have become steps
        assert trainer.plan is not None
        trainer.plan.save(job.folder / "plan.json")
        print(trainer.plan.table(console.terminal_width()), flush=True)
        timelines = _train_steps(job, trainer, done, signals)
        summary = _summary(job, trainer, parameters, timelines)
        take_exact(model, trainer)
    del trainer, timelines  # masters and moments
    free_memory()
    _finish(job, model, summary)
    return summary


def _resume(job: Job, trainer: ModelParallelTrainer) -> int:
    """Load the run's checkpoint; returns its step, 0 where none was written yet.

    Raises:
        ValueError: the run's metrics tell of a checkpoint that is not there, or it cannot be read.
    """
    folder = job.folder
    folder.lock()  # nobody may write the checkpoint that is read
    if folder.checkpoint.exists() or checkpoint.exists(folder.checkpoint):  # a crash may have left it beside its place
        trainer.load(folder.checkpoint)
        job.say(f"going on with {folder.path} after step {trainer.steps_done}")
        return trainer.steps_done
    if saved := last_saved(read_metrics(folder.metrics)):
        raise ValueError(
            f"--resume {folder.path}: step {saved} was saved in {folder.checkpoint}, which is gone: put it back, or "
            "start a new run"
        )
    job.say(f"{folder.path} has no checkpoint yet: beginning at step 1")
    return 0


def _train_steps(job: Job, trainer: ModelParallelTrainer, done: int, signals: StopSignals) -> deque[Timeline]:
    """Run the steps that are left; returns the timelines of the last `TIMELINES` of them."""
    config, folder = job.config, job.folder
    steps = config.planned_steps()
    assert steps is not None
    metrics, guard = MetricsFile(folder.metrics), Guard()
    metrics.keep_up_to(done)
    curve = job.corpus.validation_batches(config.batch, config.seq, reference.curve_windows(config))
    shown, val_loss = console.RunningMean(), None
    timelines: deque[Timeline] = deque(maxlen=TIMELINES)
    skipped = sum(bool(row.get("skipped")) for row in train_rows(read_metrics(folder.metrics)))
    plan, due = trainer.plan, False
    with console.open_view(f"train {folder.name}", steps, done) as view:
        job.view = view
        for step in range(done, steps):
            result = trainer.step(*job.corpus.batch(config.seed, step, config.batch, config.seq))
            if trainer.plan is not plan and trainer.plan is not None:
                plan = trainer.plan
                plan.save(folder / "plan.json")  # planned again: the run goes on by this one
                timelines.clear()  # this step ran by the old one
            else:
                timelines.append(trainer.timeline())
            metrics.append(**_row(step + 1, result, config))
            guard.check(step + 1, result, config)
            skipped += result.skipped
            if reference.is_eval_step(config, step + 1, steps):
                val_loss = evaluate(trainer, curve)
                metrics.append(step=step + 1, val_loss=val_loss)
            view.update(
                console.Progress(
                    step + 1, shown.add(result.loss), result.tokens_per_s, result.loss_scale, skipped, val_loss
                )
            )
            stop = signals.asked
            due = due or stop is not None or (step + 1) % config.save_every == 0 or step + 1 == steps
            if due and guard.sound and (step + 1 < steps or math.isfinite(val_loss or 0.0)):
                trainer.save(folder.checkpoint)  # never over a good one with weights that have no finite loss
                metrics.append(step=step + 1, saved=True)
                due = False
            if stop is not None and step + 1 < steps:
                kept = "not saved, since its loss is not finite" if due else "saved"
                raise Stopped(
                    stop, f"stopped after step {step + 1} of {steps}, {kept}; go on with --resume {folder.path}"
                )
    if not guard.sound:
        raise _diverged(job, "loss", steps)
    return timelines


def _diverged(job: Job, what: str, step: int) -> ValueError:
    config = job.config
    saved = last_saved(read_metrics(job.folder.metrics))
    kept = f"the checkpoint is that of step {saved}" if saved else "there is no checkpoint"
    less = f"a smaller --lr than {config.lr:g}" + ("" if config.precision == "fp32" else ", or --precision fp32")
    return ValueError(
        f"the run diverged: the {what} is not finite after step {step}; no model was written, and {kept}: start a new "
        f"run with {less}"
    )


def _row(step: int, result: StepResult, config: TrainConfig) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * config.tokens_per_step,
        "loss": result.loss,
        "lr": config.lr * config.lr_factor(step - 1),
        "grad_norm": result.grad_norm,
        "loss_scale": result.loss_scale,
        "skipped": result.skipped,
        "tokens_per_s": result.tokens_per_s,
    }


def _summary(job: Job, trainer: ModelParallelTrainer, parameters: int, timelines: deque[Timeline]) -> dict[str, Any]:
    config, folder = job.config, job.folder
    steps = trainer.steps_done
    rows = train_rows(read_metrics(folder.metrics))
    val_loss = evaluate(trainer, job.corpus.validation_batches(config.batch, config.seq))
    if not math.isfinite(val_loss):
        raise _diverged(job, "validation loss", steps)
    seconds = sum(config.tokens_per_step / row["tokens_per_s"] for row in rows)
    summary: dict[str, Any] = {
        "run": folder.name,
        "corpus": job.corpus.name,
        "unit": job.unit,
        "parameters": parameters,
        "steps": steps,
        "tokens": steps * config.tokens_per_step,
        "seconds": seconds,
        "tokens_per_s": len(rows) * config.tokens_per_step / seconds,
        "val_loss": val_loss,
        "guess_loss": math.log(load_config(config.model).get_text_config().vocab_size),
        "skipped": sum(bool(row["skipped"]) for row in rows),
        "loss_scale": rows[-1]["loss_scale"],
        "precision": config.precision,
        "transfer": config.transfer,
    }
    return summary | _pictures_of_pipeline(job, trainer, timelines)


def _finish(job: Job, model: nn.Module, summary: dict[str, Any]) -> None:
    save_model(model, job.tokenizer, job.folder / "model")
    if job.sample:
        summary["prompt"], summary["sample"] = sample_of(model, job.tokenizer, job.corpus, job.config)
    save_result(job.folder / "summary.json", summary)
    draw_losses(job, summary)


def _pictures_of_pipeline(job: Job, trainer: ModelParallelTrainer, timelines: deque[Timeline]) -> dict[str, Any]:
    """timeline.png and trace.json of the step of median duration, if steps ran in this process; median idle share."""
    if not timelines:
        return {}
    typical = sorted(timelines, key=lambda timeline: timeline.makespan)[len(timelines) // 2]
    predicted = trainer.predicted_timeline()
    assert trainer.plan is not None
    how = f"{trainer.plan.settings.schedule}, {trainer.plan.settings.microbatches} microbatches"
    title = f"{job.folder.name}: a typical step's pipeline, {how}"
    draw_timeline(typical, job.folder / "timeline.png", title, predicted)
    write_trace(typical, job.folder / "trace.json")
    idle_share = statistics.median(timeline.idle_share for timeline in timelines)
    return {"idle_share": idle_share, "predicted_idle_share": predicted.idle_share}


def draw_losses(job: Job, summary: dict[str, Any]) -> None:
    """loss.png from what the folder holds, with the reference's curve if there is one."""
    config = job.config
    report.draw_loss(
        job.folder / "loss.png",
        f"{summary['parameters'] / 1e6:.1f}M parameters, {config.precision}, {Path(summary['corpus']).name}",
        read_metrics(job.folder.metrics),
        unit=job.unit,
        final_val=summary["val_loss"],
        reference=read_metrics(job.folder / reference.METRICS),
    )


__all__ = ["Job", "draw_losses", "make_trainer", "train"]
