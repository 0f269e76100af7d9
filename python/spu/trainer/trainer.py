"""Train a model over several devices: cut into stages, run by a schedule, updated as one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spu.common.interrupts import delayed_interrupts
from spu.common.options import takes_keywords
from spu.devices.clock import Elapsed, Mark, mark
from spu.devices.manager import Device
from spu.devices.tiers import Tiers, parse_tiers
from spu.engine.counted import counted_bytes, peak_bytes
from spu.engine.generators import set_generator_states
from spu.engine.labels import labelled
from spu.engine.loss import cross_entropy
from spu.engine.make_optimizer import OptimizerFactory
from spu.engine.microbatch import at_least
from spu.engine.result import StepResult
from spu.engine.runner import Pass
from spu.engine.state import load_training
from spu.engine.update import Update
from spu.model.layers import is_adapted
from spu.plan import Plan
from spu.plan.show.compare import comparison, replanned
from spu.precision import LossScaler
from spu.schedules import Timeline
from spu.settings import TrainSettings
from spu.trainer.arguments import check_arguments
from spu.trainer.bridge import StageModule
from spu.trainer.distributed import placed
from spu.trainer.manual import Parts
from spu.trainer.staged import StagedModel

__all__ = ["ModelParallelTrainer", "StepResult", "cross_entropy"]


@takes_keywords(TrainSettings)
class ModelParallelTrainer(StagedModel):
    """Trains a model cut into stages, one for each device, exactly as if it were whole.

    Args:
        model: an ``nn.Sequential``, a list of layers, a Hugging Face decoder, or any other module that can be cut into
            layers (`spu.model.traced`); or None, with :meth:`add_module`.
            It is trained in place: after the first step it holds the precision's dtype. Between steps it is yours:
            values that you change are trained on.
        devices: "auto", a name, a list of names ("cpu:0", "cuda:0"), or what ``DeviceManager.get_devices`` returned.
        loss_fn: ``loss_fn(outputs, targets)`` -> mean over its targets, or their sum; default: :func:`cross_entropy`.
            Of large logits of a linear head, a plain cross-entropy is computed without them (`spu.engine.head_loss`).
            Parameters of a module are trained too, in their own dtype.
        optimizer: a torch optimizer class, or a callable from a list of fp32 tensors to an optimizer; default: our
            AdamW.
        lr: learning rate, for the default optimizer or a class.
        lr_schedule: step index -> factor on the learning rate, also on one that a torch scheduler has set. Skipped
            steps count.
        plan: a Plan made earlier, instead of planning at the first step.
        loss_weight: ``loss_weight(targets)`` -> what the mean over a microbatch divides by, or "sum" for a loss that
            adds up over rows. Default: what torch's losses, and partials of their functions, divide by or add up; for
            another loss its targets that are not ``loss_fn.ignore_index`` (-100), or "sum" by its ``reduction``,
            which is checked in the steps 1, 2, 4, 8, ...
        raw_outputs: give ``loss_fn`` the model's outputs as they are; default: 16-bit ones in fp32.
        shift: targets are labels of a causal language model as transformers takes them, one for each token: that of
            position t is compared with the prediction at t - 1. Default: each position's own target is given.
        scaler: a LossScaler of your own, for fp16.
        tiers: what there is below the devices for layers to be streamed from, as "cpu=32GB,disk=/data/spill:100GB" or
            `spu.devices.tiers.Tiers`. Beside a GPU, a CPU device's memory is such a tier, too.
        measure: time every layer before the first step, so that the plan predicts seconds and not only shares.
        report: called after the second step with predicted beside measured, as :meth:`compare` has it (``print``, say).
            Bytes are counted in the first step, seconds measured in the second. Also with what has changed after a step
            has run out of memory.
        settings: the keywords below as one object.
        {keywords}

    Raises:
        TypeError: an unknown keyword; names the nearest one. An argument of another kind.
        ValueError: an unknown device or a setting's value that is not allowed; says what is.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module] | None = None,
        devices: str | Sequence[str | torch.device | Device] | Device = "auto",
        *,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
        optimizer: OptimizerFactory | type[torch.optim.Optimizer] | None = None,
        lr: float | None = None,
        lr_schedule: Callable[[int], float] | None = None,
        plan: Plan | None = None,
        loss_weight: Callable[[Any], Any] | str | None = None,
        raw_outputs: bool = False,
        shift: bool = False,
        scaler: LossScaler | None = None,
        tiers: Tiers | str | None = None,
        measure: bool = False,
        report: Callable[[str], Any] | None = None,
        settings: TrainSettings | None = None,
        **keywords: Any,
    ) -> None:
        kinds = {"loss_fn": loss_fn, "lr_schedule": lr_schedule, "report": report, "model": model, "tiers": tiers}
        check_arguments(optimizer, lr, plan, scaler, **kinds)
        settings = TrainSettings.given(settings, keywords, "ModelParallelTrainer")
        tiers = tiers if isinstance(tiers, Tiers) else parse_tiers(tiers or "")
        super().__init__(
            Parts(model),
            partial(placed, devices, settings, tiers),
            settings,
            loss_fn=loss_fn,
            raw_outputs=raw_outputs,
            loss_weight=loss_weight,
            optimizer=optimizer,
            lr=lr,
            scaler=scaler,
            plan=plan,
            measure=measure,
            tiers=tiers,
            report=report,
        )
        self.shift = shift
        self.lr_schedule = lr_schedule
        self.seed = settings.seed
        self.steps_done = 0
        self.passes_done = 0

    # The model, and its parts run by hand

    def add_module(self, part: nn.Module) -> None:
        """Add the next part of the model; parts run in the order they were added.

        Raises:
            TypeError: not a module.
            ValueError: the trainer was given a whole model, or has run already.
        """
        self._parts.add(part)

    def modules(self) -> Iterator[StageModule]:
        """Yield the parts, on their devices, to be called by hand; gradients cross a ``detach`` between them."""
        return self._parts.modules(self.devices)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield every parameter of the model, once."""
        return iter(self._parts.parameters())

    # Training (the steps (1) to (7) in docs/architecture.md)

    @torch.inference_mode(False)
    def step(self, inputs: Any, targets: Any = None) -> StepResult:
        """Run forward and backward of a whole batch, and one update.

        Args:
            inputs: a tensor, or a pytree of tensors, [batch, ...] each.
            targets: likewise; what ``loss_fn`` compares the outputs with. Default: the inputs' ``labels``.

        Raises:
            ValueError: a batch that cannot be split as asked, or without a counted target.
            StageError: a stage failed; the update did not happen and the gradients are gone. Out of memory it is raised
                only if the step could not be repeated with less (``retry``).
        """
        begin = self._marks()
        inputs, targets = labelled(inputs, targets, shift=self.shift)
        self._set_up(inputs, targets)
        factor = self.lr_schedule(self.steps_done) if self.lr_schedule is not None else 1.0
        with ExitStack() as counting:
            attempt = partial(self._attempt, counting, inputs, targets, factor)
            done, update, began = self._repeated(attempt, inputs, targets)
            updater = self._prepared().updater  # of the stages that the step has come to
            scale = updater.scopes[-1].scale.clone()
            try:
                with delayed_interrupts():  # Ctrl-C waits: all stages are updated, or none
                    self._update(update, factor)
            except BaseException:
                updater.clear_gradients()
                raise
        end, places = self._marks(), [device.torch_device for device in self.devices]
        self._last.elapsed = Elapsed(places, began, end)
        elapsed, peaks = Elapsed(places, begin, end), peak_bytes(self.devices)
        result = StepResult(update.loss, update.grad_norm, scale, update.found_inf, done.counted, elapsed, peaks)
        if self._last.done == 2:
            self._look_back()
        return result

    def _attempt(self, counting: Any, inputs: Any, targets: Any, factor: float) -> tuple[Pass, Update, list[Mark]]:
        """Return the results of a step up to its update, and when it began; a step may need several attempts."""
        begin = self._marks()
        counting.close()
        if self._report is not None and self._last.done == 0:
            self._last.counted_bytes = counting.enter_context(counted_bytes(self._prepared()))
        return *self._reduced(inputs, targets, factor, keep_outputs=False), begin

    def _marks(self) -> list[Mark]:
        return [mark(device.torch_device) for device in self.devices]

    def _reduced(self, inputs: Any, targets: Any, factor: float = 1.0, *, keep_outputs: bool) -> tuple[Pass, Update]:
        done = self._accumulate(inputs, targets, keep_outputs=keep_outputs)
        updater = self._prepared().updater
        try:
            return done, updater.reduce(done.loss, factor)
        except BaseException:
            updater.clear_gradients()
            raise

    def _update(self, update: Update, lr_factor: float) -> None:
        self._prepared().updater.apply(update, lr_factor)
        self.steps_done += 1
        self.passes_done += 1
        self._last.done += 1

    def _look_back(self) -> None:
        """Report and replan after the second step: the first is slower, since it also allocates lasting tensors."""
        if self._report is not None:
            self._report(self.compare())
        if self.settings.replan:
            before = self._plan
            after = self.replan()
            if self._report is not None and before is not None:
                self._report(replanned(before, after))

    @torch.inference_mode(False)
    def forward_backward(
        self, inputs: Any, targets: Any = None, *, keep_outputs: bool = True
    ) -> tuple[torch.Tensor, Any]:
        """Return loss and outputs of a whole batch; leave the gradients in every parameter's ``.grad``.

        Each call has its own dropout masks, as each :meth:`step` has; a checkpoint stores the number of calls. Out of
        memory it is repeated as a step is.

        In fp16 an update of your own must be skipped if ``trainer.scaler.found_inf()`` is not 0. Call
        ``trainer.scaler.update()`` in both cases: otherwise a scale that is too large never shrinks.

        Args:
            inputs, targets: as :meth:`step` takes them.
            keep_outputs: False drops each microbatch's outputs, as :meth:`step` does; plans do not count them all.

        Returns:
            The mean loss (fp32, 0-dimensional), and the outputs of the last stage, the whole batch in one, or None.
        """
        inputs, targets = labelled(inputs, targets, shift=self.shift)
        self._set_up(inputs, targets)
        run = partial(self._reduced, inputs, targets, keep_outputs=keep_outputs)
        done, update = self._repeated(run, inputs, targets)
        self._prepared().updater.show(grads=True)
        self.passes_done += 1
        return update.loss, done.outputs

    @torch.inference_mode(False)
    def evaluate(self, inputs: Any, targets: Any = None) -> float:
        """Return the mean loss of a batch, in evaluation mode and without gradients.

        Before the first step it prepares for training on batches like this one, with at least a row a microbatch. It
        needs less than a step, and is not repeated if it runs out of memory.
        """
        rows = (self.settings if self._given_plan is None else self._given_plan.settings).parts
        inputs, targets = labelled(inputs, targets, shift=self.shift)
        self._set_up(at_least(inputs, rows), at_least(targets, rows))
        return self._ready(training=False).evaluate(inputs, targets, seed=self.seed, step=self.passes_done).item()

    @torch.inference_mode(False)
    def flush(self) -> None:
        """Give the model its present weights, where layers are streamed or offloaded; elsewhere they are always there.

        Their updates are deferred to the next step. Until then a streamed weight reads as NaN, and writing into it
        raises. Saving, loading, :meth:`forward_backward` and :meth:`close` flush by themselves; :meth:`evaluate` needs
        no flush.

        Raises:
            StoreError: the tier below has failed, and weights are lost.
            RuntimeError: before :meth:`prepare` or the first step.
        """
        if self._runner is None:
            raise RuntimeError("there is nothing to flush yet: call prepare() or step() first")
        self._readable()

    def _accumulate(self, inputs: Any, targets: Any, *, keep_outputs: bool) -> Pass:
        done = self._ready().accumulate(
            inputs, targets, seed=self.seed, step=self.passes_done, keep_outputs=keep_outputs
        )
        self._last.recording = done.recording
        return done

    # What happened

    def timeline(self) -> Timeline:
        """Return the measured timeline of the last step, in seconds from its start.

        Raises:
            RuntimeError: before the first step.
        """
        if self._last.recording is None:
            raise RuntimeError("no step has run yet: call step() or forward_backward() first")
        return self._last.recording.timeline()

    def predicted_timeline(self) -> Timeline:
        """Return the simulated timeline for the plan's layer times.

        Raises:
            RuntimeError: before :meth:`prepare` or the first step.
        """
        if self._plan is None:
            raise RuntimeError("there is no plan yet: call prepare() or step() first")
        return self._plan.timeline()

    def compare(self) -> str:
        """Return a table of the last step, predicted beside measured: time, idle share, devices' work, peak bytes.

        Raises:
            RuntimeError: before the first step.
        """
        last = self._last
        if self._plan is None or last.recording is None or last.elapsed is None:
            raise RuntimeError("no step has run yet: call step() first")
        peaks = last.counted_bytes | peak_bytes(self.devices)
        lines = comparison(self._plan, last.recording.timeline(), last.elapsed.seconds, peaks)
        return "\n".join([*lines, *self._prepared().graphs_lines])

    # State

    def state_dict_for_model(self) -> dict[str, torch.Tensor]:
        """Return the model's parameters and buffers by their names in it, copied to the CPU.

        Trained parameters are in full precision (fp32 masters), frozen ones, which have no master, in the training's.

        Raises:
            RuntimeError: before :meth:`prepare` or the first step, and where the values would not be those of one step
                or not this trainer's: after an update that failed half-way, or when another trainer has taken over.
        """
        if self._runner is None:
            raise RuntimeError("the trainer holds no trained state yet: call prepare() or step() first")
        return self._state_for_model()

    def save(self, path: str | Path, extra: dict[str, Any] | None = None) -> None:
        """Write a checkpoint that any number of stages can resume from.

        Args:
            path: the checkpoint's directory; replaced atomically if it is one.
            extra: JSON of your own, returned by :meth:`load`.

        Raises:
            CheckpointError: writing failed, or the optimizer or a module keeps what cannot be saved.
            RuntimeError: as :meth:`state_dict_for_model`; the checkpoint that was there stays.
        """
        if self._runner is None:
            raise RuntimeError("nothing to save yet: call prepare() or step() first")
        meta = {
            "step": self.steps_done,
            "passes": self.passes_done,
            "seed": self.seed,
            "precision": self.precision,
            "scaler": self.scaler.state_dict(),
            "plan": json.loads(self._plan.to_json()) if self._plan is not None else None,
            "extra": extra or {},
        }
        whole = not is_adapted(self._parts.as_module())  # of a PeftModel, the adapters are enough
        self._save(path, meta, frozen=whole)

    @torch.inference_mode(False)
    def load(self, path: str | Path) -> dict[str, Any]:
        """Restore weights, optimizer, loss scale and step from a checkpoint. Call :meth:`prepare` first.

        Returns:
            The ``extra`` of :meth:`save`.

        Raises:
            CheckpointError: missing, damaged, or of another model or optimizer: nothing was changed. Or the disk failed
                in the middle, after all had been verified: nothing but another load() is possible then.
            RuntimeError: before :meth:`prepare`.
        """
        if self._runner is None:
            raise RuntimeError("call prepare(inputs, targets) with a sample batch before load()")
        updater = self._runner.updater
        updater.check_own()
        updater.show()

        with ExitStack() as whole:

            def begin() -> None:
                whole.enter_context(delayed_interrupts())  # from the first changed value to the last
                updater.broken = f"a load of {path} failed half-way"

            load = load_training if self._spread is None else self._spread.load
            meta = load(path, self._runner.built, updater.optimizers, begin)
            if meta["scaler"]:  # empty if saved in a precision without a loss scale: then it starts afresh
                self.scaler.load_state_dict(meta["scaler"])
            self.steps_done = meta["step"]
            self.passes_done = meta.get("passes", self.steps_done)
            set_generator_states(self._runner.built.stages, meta.get("generators", {}))
            self.seed = meta["seed"]
            updater.broken = ""
        return meta["extra"]

    def __enter__(self) -> ModelParallelTrainer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
