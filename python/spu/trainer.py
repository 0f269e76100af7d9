"""Train a model over several devices: cut into stages, run by a schedule, updated as one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from spu import ops, placement, schedules
from spu.devices import Device, DeviceManager
from spu.engine.bridge import Bridge, StageModule
from spu.engine.build import DTYPES, Built, build_stages, to_precision
from spu.engine.layers import Layer, model_layers, parts_as_layers
from spu.engine.local import LocalEngine, Round
from spu.engine.microbatch import batch_rows, cast, count_targets, split_batch, target_weights, unscaled_leaves
from spu.engine.result import StepResult, join_outputs, sum_losses
from spu.engine.state import load_training, model_state, save_training
from spu.engine.update import OptimizerFactory, Updater, release
from spu.plan import Plan
from spu.precision import LossScaler
from spu.schedules import Timeline

__all__ = ["ModelParallelTrainer", "StepResult", "cross_entropy"]


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The default loss: mean cross entropy in fp32.

    Args:
        outputs: logits [..., classes].
        targets: class indices int64 [...]; -100 is not counted.
    """
    return F.cross_entropy(outputs.flatten(0, -2).float(), targets.flatten())


class ModelParallelTrainer:
    """Trains a model cut into stages, one for each device, exactly as if it were whole.

    Args:
        model: an ``nn.Sequential``, a list of layers, or a Hugging Face decoder; or None, with :meth:`add_module`.
            It is trained in place: after the first step it holds the precision's dtype.
        devices: "auto", a name, a list of names ("cpu:0", "cuda:0"), or what ``DeviceManager.get_devices`` returned.
        loss_fn: ``loss_fn(outputs, targets)`` -> mean over its targets; default: :func:`cross_entropy`.
        optimizer: a torch optimizer class, or a callable from a list of fp32 tensors to an optimizer; default: our
            AdamW.
        lr: learning rate, for the default optimizer or a class.
        lr_schedule: step index -> factor on the learning rate. Skipped steps count.
        precision: "fp16", "bf16" or "fp32": weights and activations of :meth:`step`, :meth:`forward_backward` and
            :meth:`evaluate`. Main gradients, master weights and moments are fp32. fp16 scales the loss.
        microbatches: how many the schedule runs at a time.
        accumulate: how many times the schedule runs for one update; a batch is cut into microbatches * accumulate.
        schedule: "1f1b" or "gpipe".
        plan: a Plan made earlier, instead of planning at the first step.
        transfer: how tensors cross between stages: "none", a codec of ``spu.ops.pack``, or "auto" (nothing is packed
            between devices of one process: their links are faster than packing).
        recompute: keep only each layer's input for the backward; "auto" does so where the budget asks for it.
        max_grad_norm: clip the global gradient norm to this.
        seed: of every random draw in the model.
        loss_weight: ``loss_weight(targets)`` -> how much a microbatch counts; default: its targets that are not
            ``loss_fn.ignore_index`` (-100).
        scaler: a LossScaler of your own, for fp16.
        measure: time every layer before the first step, so that the plan predicts seconds and not only shares.

    Raises:
        ValueError: an unknown device, precision, schedule or codec, or a number below 1; lists what there is.
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
        precision: str = "fp16",
        microbatches: int = 8,
        accumulate: int = 1,
        schedule: str = "1f1b",
        plan: Plan | None = None,
        transfer: str = "auto",
        recompute: str | bool = "auto",
        max_grad_norm: float | None = None,
        seed: int = 0,
        loss_weight: Callable[[Any], Any] | None = None,
        scaler: LossScaler | None = None,
        measure: bool = False,
    ) -> None:
        self.devices = DeviceManager().get_devices(devices)
        self.precision = _one_of("precision", precision, DTYPES)
        self.microbatches = _at_least_one("microbatches", microbatches)
        self.accumulate = _at_least_one("accumulate", accumulate)
        schedules.get(schedule)
        self.schedule = schedule
        self.codec = (
            None if transfer in ("auto", "none") else _one_of("transfer", transfer, ["auto", "none", *ops.CODECS])
        )
        self.recompute = _one_of("recompute", recompute, ["auto", True, False])
        self.loss_fn = loss_fn or cross_entropy
        self.lr_schedule = lr_schedule
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.loss_weight = loss_weight
        self.measure = measure
        self.scaler = scaler or LossScaler(enabled=precision == "fp16")
        self.steps_done = 0
        self._optimizer, self._lr = optimizer, lr
        self._backend = ops.forced_backend()
        self._layers: list[Layer] | None = None if model is None else model_layers(model)
        self._parts: list[nn.Module] = []
        self._given_plan = plan
        self._plan: Plan | None = None
        self._built: Built | None = None
        self._engine: LocalEngine | None = None
        self._updater: Updater | None = None
        self._timeline: Timeline | None = None
        self._stage_modules: list[StageModule] = []

    # The model by hand

    def add_module(self, part: nn.Module) -> None:
        """Add the next part of the model; parts run in the order they were added.

        Raises:
            TypeError: not a module.
            ValueError: the trainer was given a whole model, or has run already.
        """
        if not isinstance(part, nn.Module):
            raise TypeError(f"add_module takes an nn.Module, got {type(part).__name__}")
        if self._layers is not None and not self._parts:
            raise ValueError("this trainer was given a whole model; add parts to ModelParallelTrainer(devices=...)")
        if self._engine is not None or self._stage_modules:
            raise ValueError("parts cannot be added any more: the trainer has placed the ones it has")
        self._parts.append(part)
        self._layers = parts_as_layers(self._parts)

    def modules(self) -> Iterator[StageModule]:
        """The parts on their devices, in order, to be called by hand; gradients cross a ``detach`` between them."""
        if not self._stage_modules:
            layers = self._require_layers()
            bridge = Bridge()
            homes = placement.place_parts(layers, self.devices)
            for index, (layer, device) in enumerate(zip(layers, homes)):
                layer.module.to(device.torch_device)
                self._stage_modules.append(StageModule(layer.module, index, device.torch_device, bridge))
        return iter(self._stage_modules)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter of the model, once."""
        seen = {id(p): p for layer in self._require_layers() for p in layer.module.parameters()}
        return iter(seen.values())

    # Planning

    @property
    def plan(self) -> Plan | None:
        """Where everything goes; None before :meth:`prepare` or the first step."""
        return self._plan

    def prepare(self, inputs: Any, targets: Any = None) -> Plan:
        """Plan on a sample batch and set the stages up; the first step does it by itself.

        Raises:
            ValueError: more devices than layers, or no placement under the budgets; nothing was moved or converted.
        """
        if self._plan is not None:
            return self._plan
        layers = self._require_layers()
        sample = self._split(inputs, self.microbatches * self.accumulate)[0]
        plan = self._given_plan or placement.plan_model(
            layers,
            sample,
            self.devices,
            schedule=self.schedule,
            microbatches=self.microbatches,
            accumulate=self.accumulate,
            precision=self.precision,
            codec=self.codec,
            recompute=self.recompute,
        )
        self._check_plan(plan)
        release(layers)
        masters = to_precision(layers, self.precision)
        if self.measure:
            plan = placement.measure_plan(plan, layers, sample, self.devices)
        built = build_stages(
            layers,
            [range(*stage.layers) for stage in plan.stages],
            self.devices,
            loss_fn=self.loss_fn,
            recompute=plan.recompute,
        )
        built.masters.update(masters)
        self._built = built
        self._engine = LocalEngine(built.stages, codec=self.codec, backend=self._backend)
        try:
            self._updater = Updater(
                built,
                self._engine,
                self.scaler,
                optimizer=self._optimizer,
                lr=self._lr,
                max_grad_norm=self.max_grad_norm,
            )
        except BaseException:
            built.restore()
            raise
        built.masters.clear()  # the optimizers own them now
        self._plan = plan
        return plan

    # Training

    def step(self, inputs: Any, targets: Any) -> StepResult:
        """Forward and backward of a whole batch, and one update.

        Args:
            inputs: a tensor, or a pytree of tensors, [batch, ...] each.
            targets: likewise; what ``loss_fn`` compares the outputs with.

        Raises:
            ValueError: a batch that cannot be split as asked, or without a counted target.
            StageError: a stage failed; the update did not happen and the gradients are gone.
        """
        begin = time.perf_counter()
        self.prepare(inputs, targets)
        loss, _, counted = self._accumulate_gradients(inputs, targets, keep_outputs=False)
        updater = self._require_updater()
        scale = updater.scopes[-1].scale.clone()
        update = updater.reduce()
        factor = self.lr_schedule(self.steps_done) if self.lr_schedule is not None else 1.0
        updater.apply(update, factor)
        self.steps_done += 1
        seconds = time.perf_counter() - begin
        return StepResult(
            loss, update.grad_norm, scale, update.found_inf, counted, seconds, placement.peak_bytes(self.devices)
        )

    def forward_backward(self, inputs: Any, targets: Any) -> tuple[torch.Tensor, Any]:
        """Loss and outputs of a whole batch; the gradients are left in every parameter's ``.grad``.

        Returns:
            The mean loss (fp32, 0-dimensional), and the outputs of the last stage, the whole batch in one.
        """
        self.prepare(inputs, targets)
        loss, outputs, _ = self._accumulate_gradients(inputs, targets, keep_outputs=True)
        self._require_updater().reduce()
        return loss, outputs

    def evaluate(self, inputs: Any, targets: Any) -> float:
        """Mean loss of a batch, in evaluation mode and without gradients."""
        self.prepare(inputs, targets)
        built, engine = self._require_engine()
        modules = [module for layer in self._require_layers() for module in layer.module.modules()]
        training = [module for module in modules if module.training]
        parts = min(self.microbatches, batch_rows(inputs))
        targets_by_part = split_batch(targets, parts, "targets")
        work = Round(
            schedules.forward_only(len(built.stages), parts),
            self._split(inputs, parts),
            targets_by_part,
            self._weights(targets_by_part),
            self.seed,
            self.steps_done,
        )
        try:
            for module in training:
                module.training = False
            engine.run(work)
        finally:
            for module in training:
                module.training = True
        return sum_losses(work.losses).item()

    def _accumulate_gradients(self, inputs: Any, targets: Any, *, keep_outputs: bool) -> tuple[torch.Tensor, Any, Any]:
        built, engine = self._require_engine()
        updater = self._require_updater()
        parts = self.microbatches * self.accumulate
        inputs_by_part = self._split(inputs, parts)
        targets_by_part = split_batch(targets, parts, "targets")
        weights = self._weights(targets_by_part)
        actions = schedules.get(self.schedule)(len(built.stages), self.microbatches)
        losses: dict[int, torch.Tensor] = {}
        outputs: list[Any] = []
        timelines = []
        updater.begin_step()
        try:
            for first in range(0, parts, self.microbatches):
                own = slice(first, first + self.microbatches)
                work = Round(
                    actions,
                    inputs_by_part[own],
                    targets_by_part[own],
                    weights[own],
                    self.seed,
                    self.steps_done,
                    first,
                    updater.scopes,
                    keep_outputs,
                )
                timelines.append(engine.run(work))
                losses.update({first + index: loss for index, loss in work.losses.items()})
                outputs.extend(work.outputs[index] for index in sorted(work.outputs))
        except BaseException:
            updater.clear_gradients()
            raise
        self._timeline = timelines[-1]
        counted = sum(count_targets(part, self._ignore_index) for part in targets_by_part)
        return sum_losses(losses), join_outputs(outputs) if keep_outputs else None, counted

    # What happened

    def timeline(self) -> Timeline:
        """The last step's pipeline as it ran, in seconds from its start.

        Raises:
            RuntimeError: before the first step.
        """
        if self._timeline is None:
            raise RuntimeError("no step has run yet: call step() or forward_backward() first")
        return self._timeline

    def predicted_timeline(self) -> Timeline:
        """The simulator's timeline for the plan's layer times.

        Raises:
            RuntimeError: before :meth:`prepare` or the first step.
        """
        if self._plan is None:
            raise RuntimeError("there is no plan yet: call prepare() or step() first")
        return self._plan.timeline()

    # State

    def state_dict_for_model(self) -> dict[str, torch.Tensor]:
        """Parameters in full precision and buffers by their names in the model, copied to the CPU.

        Raises:
            RuntimeError: before :meth:`prepare` or the first step.
        """
        if self._built is None:
            raise RuntimeError("the trainer holds no trained state yet: call prepare() or step() first")
        state = model_state(self._built, self._require_updater().optimizers)
        return {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}

    def save(self, path: str | Path, extra: dict[str, Any] | None = None) -> None:
        """Write a checkpoint that any number of stages can resume from.

        Args:
            path: the checkpoint's directory; replaced atomically if it is one.
            extra: JSON of your own, returned by :meth:`load`.
        """
        if self._built is None:
            raise RuntimeError("nothing to save yet: call prepare() or step() first")
        optimizers = self._require_updater().optimizers
        meta = {
            "step": self.steps_done,
            "seed": self.seed,
            "precision": self.precision,
            "scaler": self.scaler.state_dict(),
            "plan": json.loads(self._plan.to_json()) if self._plan is not None else None,
            "extra": extra or {},
        }
        save_training(path, self._built, optimizers, meta)

    def load(self, path: str | Path) -> dict[str, Any]:
        """Go on from a checkpoint: weights, optimizer, loss scale and step. Call :meth:`prepare` first.

        Returns:
            The ``extra`` of :meth:`save`.

        Raises:
            CheckpointError: missing, damaged, or of another model; nothing was changed.
            RuntimeError: before :meth:`prepare`.
        """
        if self._built is None:
            raise RuntimeError("call prepare(inputs, targets) with a sample batch before load()")
        meta = load_training(path, self._built, self._require_updater().optimizers)
        if meta["scaler"]:  # empty if saved in a precision without a loss scale: then it starts afresh
            self.scaler.load_state_dict(meta["scaler"])
        self.steps_done = meta["step"]
        self.seed = meta["seed"]
        return meta["extra"]

    # Ending

    def close(self) -> None:
        """End the worker threads and give the model back with its ties; harmless when called twice."""
        if self._engine is not None:
            self._engine.close()
        if self._updater is not None:
            self._updater.close()

    def __enter__(self) -> ModelParallelTrainer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _ignore_index(self) -> int:
        return getattr(self.loss_fn, "ignore_index", -100)

    def _split(self, inputs: Any, parts: int) -> list[Any]:
        return [cast(unscaled_leaves(part), DTYPES[self.precision]) for part in split_batch(inputs, parts)]

    def _check_plan(self, plan: Plan) -> None:
        settings: dict[str, Any] = {
            "schedule": self.schedule,
            "microbatches": self.microbatches,
            "accumulate": self.accumulate,
            "precision": self.precision,
            "transfer": (self.codec or "none",) * (len(self.devices) - 1),
        }
        if self.recompute != "auto":
            settings["recompute"] = self.recompute
        placement.check_plan(plan, self._require_layers(), self.devices, **settings)

    def _weights(self, targets: list[Any]) -> list[torch.Tensor]:
        return target_weights(targets, self.loss_weight, self._ignore_index)

    def _require_layers(self) -> list[Layer]:
        if self._layers is None:
            raise ValueError("the trainer has no model: pass one, or call add_module() for each part")
        return self._layers

    def _require_engine(self) -> tuple[Built, LocalEngine]:
        assert self._built is not None
        assert self._engine is not None
        return self._built, self._engine

    def _require_updater(self) -> Updater:
        assert self._updater is not None
        return self._updater


def _one_of(what: str, value: Any, known: Any) -> Any:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; there are {', '.join(map(repr, known))}")
    return value


def _at_least_one(what: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be a whole number of at least 1, got {value!r}")
    return value
