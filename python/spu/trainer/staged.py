"""A model on its stages: planned, built, checked before every use, and given back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from spu import ops, schedules
from spu.common.interrupts import delayed_interrupts, stop_if_asked
from spu.common.out_of_memory import forget_frames, free_memory, is_out_of_memory
from spu.devices.clock import Elapsed
from spu.devices.manager import Device
from spu.devices.tiers import Tiers
from spu.engine.build import (
    BuiltStages,
    build_stages,
    check_parameters,
    frozen_dtypes,
    restore_masters,
    to_precision,
    undo_precision,
    unfused,
)
from spu.engine.engine import Recording
from spu.engine.first_batch import check_batch, with_rows
from spu.engine.generators import generator_states
from spu.engine.labels import labelled
from spu.engine.loss import OnRawOutputs, cross_entropy, weighing_of
from spu.engine.make_optimizer import OptimizerFactory
from spu.engine.microbatch import batch_rows
from spu.engine.runner import Runner
from spu.engine.state import Carried, give_value, state_for_model, training_state
from spu.engine.structure import StructureCheck
from spu.engine.tiers import converting, open_streaming, park_again, spare_heap
from spu.engine.update import release
from spu.model.deferred import brought
from spu.optim.forms import in_form
from spu.plan import Plan
from spu.plan.check import used_devices
from spu.precision import LossScaler
from spu.settings import AUTO, TrainSettings
from spu.trainer.distributed import Spread
from spu.trainer.manual import Parts
from spu.trainer.planner import WORTH, Planner
from spu.trainer.retry import lower, with_advice

__all__ = ["LastStep", "StagedModel"]

T = TypeVar("T")

_MOST_RETRIES = 8  # notches that one pass may go down: all of them, and microbatches of 1/64 of their rows


@dataclass
class LastStep:
    """The measurements of the last step, for reports and plans.

    Attributes:
        done: number of steps of this trainer, without those before a checkpoint.
        recording: of the last run of the schedule; None before the first one, and after the stages have moved.
        elapsed: the whole step.
        counted_bytes: the peak of each device in a step whose bytes were counted.
    """

    done: int = 0
    recording: Recording | None = None
    elapsed: Elapsed | None = None
    counted_bytes: dict[str, int] = field(default_factory=dict)


class StagedModel:
    """A model cut into stages; the base of `ModelParallelTrainer`.

    Args:
        parts: the model.
        where: gives the devices, in pipeline order, and the processes where the stages are in several.
        settings: of the training; the other arguments are the trainer's.
    """

    def __init__(
        self,
        parts: Parts,
        where: Callable[[], tuple[list[Device], Spread | None]],
        settings: TrainSettings,
        *,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None,
        optimizer: OptimizerFactory | type[torch.optim.Optimizer] | None,
        lr: float | None,
        plan: Plan | None,
        loss_weight: Callable[[Any], Any] | str | None,
        raw_outputs: bool,
        scaler: LossScaler | None,
        measure: bool,
        tiers: Tiers,
        report: Callable[[str], Any] | None,
    ) -> None:
        self._parts = parts
        self.settings = settings
        self.precision, self.accumulate = settings.precision, settings.accumulate
        self.loss_fn = cross_entropy if loss_fn is None else loss_fn
        self.max_grad_norm = settings.max_grad_norm
        self.measure, self.tiers = measure, tiers
        self.shift = False
        self._report = report
        self.scaler = scaler or LossScaler(enabled=settings.precision == "fp16")
        self._loss = OnRawOutputs(self.loss_fn) if raw_outputs else self.loss_fn
        self._weighing = weighing_of(self.loss_fn, loss_weight)
        self._optimizer, self._lr = in_form(optimizer, lr, settings.state), lr
        self._backend = ops.forced_backend()
        self._fused: list[nn.Module] = []
        self._structure: StructureCheck | None = None
        self._given_plan = plan
        self._plan: Plan | None = None
        self._planner: Planner | None = None
        self._runner: Runner | None = None
        self._last = LastStep()
        self.tiers.check()
        self.devices, self._spread = where()  # last: a trainer that nobody gets gives no cores back

    @property
    def plan(self) -> Plan | None:
        """Where everything goes; None before :meth:`prepare` or the first step."""
        return self._plan

    @torch.inference_mode(False)
    def prepare(self, inputs: Any, targets: Any = None) -> Plan:
        """Plan on a sample batch and set the stages up; the first step does it by itself.

        Raises:
            ValueError: more stages than layers, a model that cannot be cut into layers, or no placement under the
                budgets; nothing was moved or converted.
        """
        return self._set_up(*labelled(inputs, targets, shift=self.shift, needed=False))

    def _set_up(self, inputs: Any, targets: Any) -> Plan:
        """Plan and build, unless that is done; inputs and targets as `labelled` returns them."""
        if self._plan is not None:
            return self._plan
        inputs, targets = with_rows(inputs, targets, (self._given_plan or self).settings.parts)
        with delayed_interrupts():  # Ctrl-C while the model is traced would leave torch patched
            layers = self._parts.layers_for(inputs)
        check_parameters(layers)
        check_batch(layers, inputs, targets, self.loss_fn)
        given = (inputs, targets), self._optimizer, self.loss_fn, self.scaler.state_dict()
        devices, machine = (self.devices, None) if self._spread is None else self._spread.planned_for(layers, given)
        planner = Planner(layers, devices, self.settings, self._loss, self.tiers, machine)

        def make() -> Plan:
            if self._given_plan is None:
                return planner.plan(inputs, targets, measure=self.measure)
            return planner.checked(self._given_plan, inputs, targets, measure=self.measure)

        frozen = frozen_dtypes(layers, self.precision) if self._spread is None else None
        with brought(self._parts.as_module(), frozen) as read, delayed_interrupts():  # or torch's fake mode stayed on
            plan = make() if self._spread is None else self._spread.plan(make)
            stop_if_asked()
            taken_over = release(layers)
            model = self._parts.as_module()
            away = frozenset[int]() if self._spread is None else self._spread.let_go(plan, layers, model, self._loss)
            self._fused = unfused(layers)
            fused = schedules.splits_backward(plan.settings.schedule)
            if plan.streaming is None:  # else what is trained, too, is read to where it will be
                read.read_trained()
            masters: dict[int, torch.Tensor] = {}
            try:
                with converting(plan, self.tiers):
                    to_precision(layers, self.precision, masters, fused=fused, away=away, empty=read.waiting)
                restore_masters(layers, taken_over)
                self._runner = self._build(plan, lambda built: built.begin(masters | taken_over, read.waiting))
                read.read_rest(partial(give_value, self._runner.built, self._runner.updater.optimizers))
            except BaseException:
                undo_precision(layers, masters | taken_over, self._fused)
                raise
            self._plan, self._planner, self._parts.placed = plan, planner, True
        return plan

    @torch.inference_mode(False)
    def replan(self) -> Plan:
        """Plan from the times that the last step measured, and move the layers if that makes a step shorter.

        Schedule and number of microbatches stay, unless they were "auto". Nothing of the training is lost:
        weights, moments and loss scale are those of the step before, and so are the next losses (to the last bit if
        nothing is packed between the stages).

        Returns:
            The plan from now on. If nothing moves (an optimizer with values for each stage forbids it), it has the same
            stages, with times from the measured step.

        Raises:
            RuntimeError: before the first step.
            ValueError: the stages are in several processes.
            Exception: a device has no room, say; the training goes on by the present plan.
        """
        if self._spread is not None:
            raise ValueError("replan() does not go with engine='distributed': layers do not move between processes")
        if self._plan is None or self._last.recording is None or self._planner is None:
            raise RuntimeError("no step has run yet: call step() first")
        old = self._ready()
        old.updater.show()
        same, best = self._planner.after_step(self._plan, self._last.recording.timeline())
        carried = Carried(old.built, old.updater.optimizers)
        if best.predicted.step_s > WORTH * same.predicted.step_s or carried.differs_by_stage:
            self._plan = same
            return same
        with delayed_interrupts():
            self._rebuild(best, carried)
        self._last.recording = None
        return best

    def _rebuild(self, plan: Plan, carried: Carried) -> None:
        """Take other stages, with the state of the present ones; where that fails, go on by the plan of before."""
        before = self._plan or plan
        try:
            self._move(plan, carried)
        except Exception:
            self._move(before, carried)
            raise

    def _move(self, plan: Plan, carried: Carried) -> None:
        old = self._prepared()
        with carried.unfrozen():
            old.updater.clear_gradients()
            old.close()
            self._runner = self._build(plan, carried.give_masters)
            carried.put_back(self._runner.built, self._runner.updater.optimizers)
        self._plan, self._last.counted_bytes = plan, {}

    def close(self) -> None:
        """End the worker threads and give the model back; harmless when called twice.

        Linear layers and blocks get their own classes back. Weights stay in the precision they were trained in:
        :meth:`state_dict_for_model` has them in full, also after this.
        """
        if self._runner is not None:
            self._runner.close()
            self._runner.built.unfuse()
        if self._spread is not None:
            self._spread.job.close()

    def _repeated(self, run: Callable[[], T], inputs: Any, targets: Any) -> T:
        """Return what a pass over a batch returns; if it runs out of memory, repeat it by a plan that takes less.

        Args:
            run: the pass, with no gradient left when it fails. It has the same random draws each time.
            inputs, targets: the batch.

        Raises:
            StageError, MemoryError: out of memory, and no such plan is left; the message says what would help.
        """
        for left in reversed(range(_MOST_RETRIES + 1)):
            attempt, retry = self._prepared().attempt, self.settings.retry and self._spread is None
            if retry:
                attempt.begin(inputs, targets)
            try:
                done = run()
            except Exception as error:
                if not retry or not is_out_of_memory(error):
                    raise
                failure = error
            else:
                if retry:
                    attempt.end()
                return done
            try:
                forget_frames(failure)  # they hold activations
                free_memory()
                with delayed_interrupts():
                    self._lower(failure, inputs, targets, left)
                    stop_if_asked()
            finally:
                del failure  # it would hold this function, and this function it
        raise AssertionError("the last attempt ends the loop")

    def _lower(self, failure: Exception, inputs: Any, targets: Any, left: int) -> None:
        """Go on by a plan that takes less memory, and say so; or raise the failure with what would help."""
        runner, plan, planner = self._prepared(), self._plan, self._planner
        assert plan is not None
        assert planner is not None
        lost, updater = runner.attempt.put_back(), runner.updater
        tier_failed = updater.streaming is not None and (updater.streaming.broken or updater.streaming.failed)
        if updater.broken or updater.closed or tier_failed:
            raise failure
        given = self._given_plan is not None
        if lost or given or not left:
            why = lost or ("the plan was given" if given else f"{_MOST_RETRIES} notches down it still does not fit")
            raise with_advice(failure, [f"the step was not repeated with less: {why}"])
        cut = self.settings.microbatches == AUTO or self.settings.parts > 1
        try:
            updater.show()
            planner = planner.for_batch(inputs, targets, plan)
            lowered = lower(planner, plan, batch_rows(inputs), runner.attempt, self._go_on_by, batch_is_cut=cut)
        except Exception as error:
            raise with_advice(failure, [f"going on with less failed: {type(error).__name__}: {error}"])  # noqa: B904
        if lowered.plan is None:
            raise with_advice(failure, lowered.advice or ["every microbatch has one row already: shorten it"])
        self._planner = planner
        text = (
            f"out of memory: {failure}\nfrom now on {lowered.label}, and the step is repeated. {lowered.means} "
            "Give it from the start to save the failed attempt"
        )
        if self._report is not None:
            self._report(text)
        warnings.warn(text, RuntimeWarning, stacklevel=5)  # who called step()

    def _go_on_by(self, plan: Plan) -> None:
        """Take a plan that needs less memory than the present one.

        Raises:
            ValueError: the optimizer has values for each stage, and the stages would be other ones.
            StoreError: the tier below has no room; the training goes on by the present plan.
        """
        before, runner = self._plan, self._prepared()
        if before is not None and before.streaming is None and plan.streaming is not None:
            carried = Carried(runner.built, runner.updater.optimizers)
            if carried.differs_by_stage:
                raise ValueError("the optimizer has values for each stage, or a scheduler refers to it")
            self._rebuild(plan, carried)
            return
        if plan.streaming is not None and runner.updater.streaming is not None:
            park_again(plan, self.tiers, runner.built, runner.updater.streaming)
        runner.follow(plan)
        self._plan, self._last.counted_bytes = plan, {}

    def _build(self, plan: Plan, add_masters: Callable[[BuiltStages], None]) -> Runner:
        """Move the layers to their planned devices, and build their stages and optimizers."""
        # By rank: another machine may name them otherwise.
        device_of = dict(zip(plan.devices, used_devices(plan, self.devices)))
        spare_heap(plan, device_of, self._parts.layers)
        built = build_stages(
            self._parts.layers,
            [range(*stage.layers) for stage in plan.stages],
            [device_of[stage.device] for stage in plan.stages],
            loss_fn=self._loss,
            recompute=plan.recomputed_layers,
            residencies=() if plan.streaming is None else plan.streaming.residency,
        )
        add_masters(built)
        built.fused = list(self._fused)
        # The flags and norms of all stages meet where the scale is, and the host does not wait for them there.
        places = [stage.device.torch_device for stage in built.stages]
        self.scaler.to(next((place for place in reversed(places) if place.type != "cpu"), places[-1]))
        runner = Runner(
            built,
            plan,
            self.scaler,
            backend=self._backend,
            weighing=self._weighing,
            optimizer=self._optimizer,
            lr=self._lr,
            max_grad_norm=self.max_grad_norm,
            make_streaming=None if plan.streaming is None else partial(open_streaming, plan, self.tiers),
            **{"graphs": self.settings.graphs} if self._spread is None else self._spread.runs(built, plan),
        )
        self._structure = StructureCheck(self._parts.given, built)
        return runner

    def _prepared(self) -> Runner:
        assert self._runner is not None
        return self._runner

    def _ready(self, *, training: bool = True) -> Runner:
        """Return the runner, after all checks, with the backend that the calling thread forces."""
        runner = self._prepared()
        assert self._structure is not None
        runner.updater.check_open()
        runner.updater.check_whole()
        self._structure.check(training=training)
        runner.engine.backend = ops.forced_backend() or self._backend
        return runner

    def _readable(self) -> Runner:
        """Return the runner after a check that its state is complete and belongs to this trainer and this model."""
        runner = self._prepared()
        assert self._structure is not None
        runner.updater.check_own()
        runner.updater.check_whole()
        self._structure.check(training=False)
        runner.updater.show()
        return runner

    def _state_for_model(self, trained: bool = False) -> dict[str, torch.Tensor]:
        runner, model = self._readable(), self._parts.as_module()
        if self._spread is not None:
            return self._spread.state_for_model(model, runner.built, runner.updater.optimizers, trained=trained)
        return state_for_model(model, runner.built, runner.updater.optimizers)

    def _save(self, path: str | Path, meta: dict[str, Any], *, frozen: bool) -> None:
        runner = self._readable()
        if self._spread is not None:
            self._spread.save(path, runner.built, runner.updater.optimizers, meta, frozen=frozen)
            return
        meta = {**meta, "generators": generator_states(runner.built.stages)}
        training_state(runner.built, runner.updater.optimizers, frozen=frozen).save(path, meta)
