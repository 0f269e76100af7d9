"""A run of ``spu train``, from settings to a trained model: prepare, a loop over the steps, finish.

``train`` reads from the top down; ``Loop`` is the part to copy for a loop of your own.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from spu.checkpoint import writing as checkpoint
from spu.common.absent import is_absent
from spu.common.dtypes import DTYPES
from spu.common.options import AUTO
from spu.common.out_of_memory import free_memory
from spu.devices.manager import DeviceManager, default_devices
from spu.devices.tiers import split_budget
from spu.optim.adamw import AdamW
from spu.plan import Plan
from spu.precision import LossScaler
from spu.schedules import Timeline
from spu.settings import TrainSettings
from spu.train.adapter import keep_adapter, make_trained_model
from spu.train.batches import Batches
from spu.train.config import TrainConfig
from spu.train.evaluate import count, curve_windows, is_eval_step, mean_over_targets, perplexity, watched
from spu.train.export import sample_of, save_from_all, save_model, take_exact
from spu.train.guard import Guard, Patience, diverged
from spu.train.job import Job
from spu.train.keep import Checkpoints, disk_line
from spu.train.metrics import MetricsFile, last_saved, read_metrics, save_result, train_rows, validation_rows
from spu.train.model import make_model
from spu.train.progress import Progress, RunningMean, open_view, terminal_width
from spu.train.ranks import LeadingTrainer, tell
from spu.train.results import draw_losses, stopped_summary, summarise
from spu.train.signals import Stopped, StopSignals
from spu.train.tensorboard import TensorBoard
from spu.train.weights import beside_disk
from spu.trainer.trainer import ModelParallelTrainer, StepResult

__all__ = ["Loop", "make_trainer", "pipeline", "settle_steps", "train"]

_MANY = 1_000_000_000  # weights that take minutes to prepare
TIMELINES = 50  # last steps among which the typical one is looked for: any single step may have been disturbed


def train(job: Job, signals: StopSignals) -> dict[str, Any]:
    """Train a run through the pipeline, from its start or its checkpoint, to its end.

    Returns:
        The summary, which is also in summary.json.

    Raises:
        Stopped: a signal asked for it; the checkpoint is of the last step done, and summary.json says so.
        ValueError: see ``make_trainer``, ``Guard`` and ``CheckpointError``; an existing checkpoint is left as it was.
    """
    with beside_disk(job.config):
        model = make_trained_model(job.config, later=True)
    parameters = sum(p.numel() for p in model.parameters())
    if parameters >= _MANY:
        job.say(
            f"preparing {parameters / 1e9:.1f} billion weights: layers are checked and timed, then the files are read"
        )
    with make_trainer(job, model) as trainer:
        loop = Loop(job, trainer, _prepare(job, trainer))
        print(loop.disk_line(), flush=True)
        try:
            loop.run(signals)
        finally:
            loop.close()
        exported = loop.choose_weights()
        val_loss = loop.validate_whole(signals)
        if not math.isfinite(val_loss):
            raise diverged(job, "validation loss", exported)
        summary = summarise(job, trainer, parameters, val_loss, loop.timelines, loop.done, exported)
        if loop.ended_early:
            summary["ended_early"] = loop.ended_early
        with beside_disk(job.config):
            written = _take(job, model, trainer)
    room = trainer.devices[0].budget_bytes
    del trainer, loop  # masters and moments
    free_memory()
    _finish(job, model, summary, room, written=written)
    return summary


def _take(job: Job, model: nn.Module, trainer: ModelParallelTrainer) -> bool:
    """Take what was trained out of the trainer, and end it; tell whether it is written already."""
    if job.config.lora is not None:
        keep_adapter(model, trainer, job.folder.path)
        return True
    if isinstance(trainer, LeadingTrainer):
        dtype = DTYPES[job.config.export_dtype]
        if save_from_all(model, trainer, job.tokenizer, job.folder / "model", dtype=dtype):
            return True
    take_exact(model, trainer)
    return False


def make_trainer(job: Job, model: nn.Module) -> ModelParallelTrainer:
    """Return the pipeline for a run, planned and built.

    Raises:
        ValueError: unknown device, more stages than layers, no placement under the budgets, unknown settings.
    """
    config, plan = job.config, job.plan()
    if config.engine == "distributed":
        # Others than before may be there. As many are given the same stages, whatever is measured of them today.
        places = dist.get_world_size() // config.replicas
        if plan is not None and plan is not job.given_plan and (plan.streaming or len(plan.devices) != places):
            plan = None
        tell("make", config.to_json(), None if plan is None else plan.to_json())
    own = plan is not None and plan is not job.given_plan
    trainer = pipeline(config, model, plan, lambda step: job.config.lr_factor(step), job.say, measure=not own)
    try:
        trainer.prepare(*job.corpus.batch(config.seed, 0, config.batch, config.seq))
    except BaseException:
        trainer.close()
        raise
    return trainer


def pipeline(
    config: TrainConfig,
    model: nn.Module,
    plan: Plan | None,
    lr_schedule: Callable[[int], float],
    say: Callable[[str], Any] | None = None,
    *,
    measure: bool = False,
) -> ModelParallelTrainer:
    """Return the trainer of a configuration, not prepared yet.

    Args:
        lr_schedule: step index -> factor on the learning rate.
        say: shows the trainer's reports; None: of a process that shows nothing.
        measure: predict times from these layers here.
    """
    budget, tiers = split_budget(config.budget)
    manager = DeviceManager(budget)
    distributed = config.engine == "distributed"
    devices: Any = config.devices
    if not distributed or config.devices != AUTO or budget:
        devices = manager.get_devices(default_devices(config.devices, config.residency, tiers.disk))
        if all(device.torch_device.type != "cpu" for device in devices):
            tiers = dataclasses.replace(tiers, host_bytes=manager.host_budget())
    return (LeadingTrainer if distributed and say is not None else ModelParallelTrainer)(
        model,
        devices,
        tiers=tiers,
        optimizer=partial(AdamW, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay),
        lr_schedule=lr_schedule,
        settings=TrainSettings.part_of(config),
        replan=config.replan and plan is None,
        plan=plan,
        measure=measure and not distributed,
        report=None if distributed else say,
        scaler=LossScaler(
            init_scale=config.init_scale, growth_interval=config.growth_interval, enabled=config.precision == "fp16"
        ),
    )


def _prepare(job: Job, trainer: ModelParallelTrainer) -> int:
    """Load the checkpoint, fix the number of steps, write the run's settings and plan; return the steps done."""
    done = 0 if job.new else _resume(job, trainer)
    settle_steps(job, trainer)
    fresh = job.new
    job.open_folder()
    if fresh or done == 0 or job.lengthened:
        job.folder.write_config(job.config, job.corpus_record)  # `minutes` have become steps
    assert trainer.plan is not None
    trainer.plan.save(job.folder / "plan.json")
    print(trainer.plan.table(terminal_width()), flush=True)
    return done


def _resume(job: Job, trainer: ModelParallelTrainer) -> int:
    """Load the run's checkpoint; return its step, 0 where none was written yet.

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


def settle_steps(job: Job, trainer: ModelParallelTrainer) -> None:
    """Turn ``minutes`` into a number of steps by timing a few that update nothing; afterwards it is fixed for good."""
    config = job.config
    if config.planned_steps() is not None:
        return
    assert config.minutes is not None
    batch = job.corpus.batch(config.seed, 0, config.batch, config.seq)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        trainer.forward_backward(*batch, keep_outputs=False)[0].item()  # a card has done it then
        times.append(time.perf_counter() - begin)
    steps = max(1, int(config.minutes * 60 / (1.05 * statistics.median(times[1:]))))  # 5% for the update
    job.config = dataclasses.replace(config, steps=steps, minutes=None)


class Loop:
    """The steps of a run that are left to do: train, record, validate, show and save.

    Attributes:
        done: steps done.
        ended_early: why it has ended before its last step; "" if it has not.
        timelines: of the last ``TIMELINES`` steps.
    """

    def __init__(self, job: Job, trainer: ModelParallelTrainer, done: int) -> None:
        config, steps = job.config, job.config.planned_steps()
        assert steps is not None
        self.job, self.trainer, self.done, self.steps = job, trainer, done, steps
        self.ended_early = ""
        self.timelines: deque[Timeline] = deque(maxlen=TIMELINES)
        self._board = TensorBoard(job.folder / "tensorboard", done) if job.tensorboard else None
        self._metrics = MetricsFile(job.folder.metrics, None if self._board is None else self._board.add)
        self._guard, self._shown = Guard(), RunningMean()
        self._metrics.keep_up_to(done)
        rows = read_metrics(job.folder.metrics)
        before = train_rows(rows)
        self._skipped = sum(bool(row.get("skipped")) for row in before)
        self._tokens = before[-1]["tokens"] if before else 0
        self._patience = Patience(config.patience, (row["val_loss"] for row in validation_rows(rows)))
        self._best = config.keep_best or config.export == "best"
        self._checkpoints = Checkpoints(job.folder, self._metrics, rows, done=done, keep=config.keep, best=self._best)
        self._validation = job.corpus.validation_batches(config.batch, config.seq, curve_windows(config))
        self._val_loss: float | None = None
        self._tokens_per_s = 0.0
        self._plan, self._due = trainer.plan, False
        self._batches = Batches(partial(job.corpus.batch, config.seed), config.batch, config.seq)

    def disk_line(self) -> str:
        """Return a line about the disk that the run takes."""
        sizes = {p: p.numel() for p in self.trainer.parameters()}
        trained = sum(size for p, size in sizes.items() if p.requires_grad)
        parameters = sum(sizes.values()) if self.job.config.lora is None else trained  # adapters alone are written
        return disk_line(self.job.folder, trained, parameters, keep=self.job.config.keep, best=self._best)

    def run(self, signals: StopSignals) -> None:
        """Run the steps.

        Raises:
            Stopped: a signal asked for it.
            ValueError: the loss is not finite or too high, see ``Guard``.
        """
        (self.job.folder / "summary.json").unlink(missing_ok=True)  # of a shorter run, or one that was stopped
        with open_view(f"train {self.job.folder.name}", self.steps, self.done) as view:
            self.job.view = view
            for step in range(self.done + 1, self.steps + 1):
                result = self._train(step)
                best = self._validate(step) if is_eval_step(self.job.config, step, self.steps) else None
                shown = self._shown.add(result.loss)
                view.update(Progress(step, shown, self._tokens_per_s, result.loss_scale, self._skipped, self._val_loss))
                last = step == self.steps or self._patience.spent
                asked = signals.asked  # read once: of a signal that comes from here on the next step takes notice
                self._save_if_due(step, best, last=last, stop=asked is not None)
                self.done = step
                if asked is not None and not last:
                    self._stop(step, asked)
                if last:
                    break
        self.job.view = None
        if not self._guard.sound:
            raise diverged(self.job, "loss", self.done)
        if self.done < self.steps:
            self.ended_early = str(self._patience)
            print(f"ended after step {self.done} of {self.steps}: {self.ended_early} (--patience)", flush=True)

    def _train(self, step: int) -> StepResult:
        """Do one step and record it. Steps count from 1."""
        config, trainer = self.job.config, self.trainer
        inputs, targets = self._batches.take(step - 1)
        result = trainer.step(inputs, targets)
        if step < self.steps:
            self._batches.make(step)  # a card is still at work: whatever is read of the result waits for it
        if trainer.plan is not self._plan and trainer.plan is not None:
            self._plan = trainer.plan  # it has planned from measured times: the run goes on by the new plan
            self._plan.save(self.job.folder / "plan.json")
            self.timelines.clear()  # this step ran by the old one
        elif config.engine == "local":
            self.timelines.append(trainer.timeline())
        self._tokens += targets.numel()
        self._tokens_per_s = targets.numel() / result.seconds
        self._metrics.append(
            step=step,
            tokens=self._tokens,
            targets=count(targets),
            loss=result.loss,
            lr=config.lr * config.lr_factor(step - 1),
            grad_norm=result.grad_norm,
            loss_scale=result.loss_scale,
            skipped=result.skipped,
            tokens_per_s=self._tokens_per_s,
        )
        self._guard.check(step, result, config)
        self._skipped += result.skipped
        return result

    def _validate(self, step: int) -> float | None:
        """Validate and record it; return the loss if its weights are to be kept as the best."""
        self._val_loss = mean_over_targets(self.trainer.evaluate, self._validation)
        self._metrics.append(step=step, val_loss=self._val_loss, perplexity=perplexity(self._val_loss))
        self._patience.add(self._val_loss)
        return self._val_loss if self._checkpoints.improves(self._val_loss) else None

    def _save_if_due(self, step: int, best: float | None, *, last: bool, stop: bool) -> None:
        """Save every ``save_every`` steps, the best weights, at the end and where a signal asks to stop.

        A checkpoint is never replaced by weights whose loss is not finite: saving then waits for a finite loss; and for
        one that is not too high, as long as there may be one.
        """
        self._due = self._due or stop or last or best is not None or step % self.job.config.save_every == 0
        sound = self._guard.sound and (not last or math.isfinite(self._val_loss or 0.0))
        if self._due and sound and (last or stop or not self._guard.high):
            self._checkpoints.save(self.trainer, step, best)
            self._due = False

    def _stop(self, step: int, signum: int) -> None:
        """Note in summary.json that the run is not finished, and raise Stopped."""
        kept = "not saved, since its loss is not finite" if self._due else "saved"
        summary = stopped_summary(self.job, step, signal.Signals(signum).name, not self._due)
        save_result(self.job.folder / "summary.json", summary)
        raise Stopped(f"stopped after step {step} of {self.steps}, {kept}; go on with --resume {self.job.folder.path}")

    def close(self) -> None:
        """Close what was opened beside the metrics."""
        if self._board is not None:
            self._board.close()

    def validate_whole(self, signals: StopSignals) -> float:
        """Return the mean loss over the whole validation set; between its batches a signal may stop it, as a step."""

        def pause() -> None:
            if signals.asked is not None:
                self._stop(self.done, signals.asked)

        batches = self.job.corpus.validation_batches(self.job.config.batch, self.job.config.seq)
        return mean_over_targets(self.trainer.evaluate, watched(batches, pause))

    def choose_weights(self) -> int:
        """Give the trainer the weights that are exported; return the step after which they were so."""
        best = self._checkpoints.best() if self.job.config.export == "best" else None
        if best is None or best[0] == self.done:
            return self.done
        self.trainer.load(best[1])
        return best[0]


def _finish(job: Job, model: nn.Module, summary: dict[str, Any], room: int, *, written: bool) -> None:
    """Write the model, a sample of its text, the summary and the picture of the losses.

    Args:
        room: bytes for a model whose layers were in several processes.
        written: the model, or its adapter.
    """
    dtype = DTYPES[job.config.export_dtype]
    if not written:
        save_model(model, job.tokenizer, job.folder / "model", dtype=dtype)
    if job.sample and (whole := _whole(job, model, room, dtype)) is not None:
        summary["prompt"], summary["sample"] = sample_of(whole, job.tokenizer, job.corpus, job.config)
    save_result(job.folder / "summary.json", summary)
    draw_losses(job, summary)


def _whole(job: Job, model: nn.Module, room: int, dtype: torch.dtype) -> nn.Module | None:
    """Return the trained model to take a sample of; None, and say so, if it would not fit this process."""
    if not any(map(is_absent, model.parameters())):
        return model
    if job.config.lora is None and 8 * sum(p.numel() for p in model.parameters()) <= room:
        return make_model(str(job.folder / "model"), job.config.seed).to(dtype)
    job.say("no sample of its text: the model's layers are in several processes")
    return None
