"""A trainer's plans: from counted costs, from measured layers, from a search, or from what a step has measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from spu import schedules
from spu.common.dtypes import DTYPES
from spu.cost.count import LossFn, model_costs
from spu.cost.head import device_type_of
from spu.cost.measure import time_disk, time_duplex, time_layers, time_packing, time_update
from spu.devices.manager import Device
from spu.devices.speed import measure_device, measure_link
from spu.devices.tiers import Tiers
from spu.engine.microbatch import batch_rows, split_batch
from spu.engine.runner import split_inputs
from spu.model.layers import Layer
from spu.plan import BudgetError, Plan, make_plan
from spu.plan.check import check_fits, check_plan
from spu.plan.layer_cost import LayerCost
from spu.plan.machine import Machine, Speed
from spu.plan.make import plain_loss
from spu.plan.make_streaming import StreamingRequest, predict_streaming
from spu.plan.request import crossings, fastest_codec
from spu.plan.search import search_plan
from spu.schedules import Timeline
from spu.settings import AUTO, Recompute, Settings

__all__ = ["Planner"]

Times = list[list[tuple[float, float]]]
"""[devices][layers, and last the loss] (forward, backward) seconds of one microbatch."""

NO_TIERS = Tiers()

WORTH = 0.98
"""A new placement has to bring a step down to this share of the old one's time to be worth moving for."""

WORTH_PACKING = 0.5
"""A link is slow where packing brings a tensor over it in this share of the time: no matter of measuring noise."""


class Planner:
    """Makes the plans of one model on its devices.

    Args:
        layers: the model, in any precision; planning changes nothing of it.
        devices: in pipeline order; all of them are used.
        settings: of the training.
        loss_fn: as in the trainer.
        tiers: what there is below the devices.
        machine: the devices as they were measured, to be planned for; None: as `counted_machine` takes them.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        devices: Sequence[Device],
        settings: Settings,
        loss_fn: LossFn,
        tiers: Tiers = NO_TIERS,
        machine: Machine | None = None,
    ) -> None:
        check_made(layers)
        self.layers, self.devices, self.settings, self.loss_fn = layers, devices, settings, loss_fn
        self.tiers, self._given = tiers.beside(devices), machine
        self._defers = settings.schedule == AUTO or schedules.splits_backward(settings.schedule)
        self._batch: tuple[Any, Any] = (None, None)
        self._costs: dict[int, tuple[list[LayerCost], LayerCost | None]] = {}
        self._times: dict[int, Times] = {}

    def plan(self, inputs: Any, targets: Any, *, measure: bool) -> Plan:
        """Return a plan for batches like this one.

        Where schedule and number of microbatches are given, counted costs are balanced, so that the same command gives
        the same stages, and so the same bits, every time. Where one is "auto", a search simulates measured layers.

        Args:
            inputs, targets: a whole batch; targets may be None.
            measure: predict seconds from measured layers; a search always does.

        Raises:
            ValueError: more stages than layers, a batch that cannot be split, a layer that cannot run on fakes.
            BudgetError: nothing fits.
        """
        self._batch = inputs, targets
        s = self.settings
        if s.searched:
            return self._searched(self.times, s)
        machine = self._counted()
        makers = [self._resident] if s.residency in (AUTO, "resident") else [self._streamed]
        if s.residency == AUTO and self._streaming(machine).possible:
            makers.append(self._streamed)
        found, errors = [], []
        for make in makers:
            try:
                found.append(make(machine))
            except BudgetError as error:
                errors.append(error)
        if not found:
            raise errors[0] if len(errors) == 1 else errors[1].after(errors[0])
        plan = min(found, key=lambda way: float(f"{way.predicted.step_s:.2e}"))  # where both are as fast, resident
        return self.measured(plan) if measure else plan

    def _resident(self, machine: Machine) -> Plan:
        s = self.settings
        self._check_enough_layers()
        sample, _ = self.sample(s.parts)
        costs, loss = self.costs(s.parts)
        rows = batch_rows(sample)
        return make_plan(
            costs,
            machine,
            s,
            loss_cost=loss,
            codecs=self._codecs(costs),
            max_microbatches=s.run_microbatches * rows,
            rows=rows,
            tokens=tokens_of(sample),
        )

    def _counted(self) -> Machine:
        """Return the machine that layers are balanced over: its links take no time."""
        machine = counted_machine(self.devices, self.settings.precision) if self._given is None else self._given
        return replace(machine, links=dict.fromkeys(machine.links, math.inf))

    def _codecs(self, costs: Sequence[LayerCost]) -> list[str] | None:
        """Return the codec of each boundary where "auto" knows the links; None: as the settings say."""
        s, machine = self.settings, self._given
        if machine is None or s.transfer != AUTO:
            return None
        middle, pairs = costs[len(costs) // 2].input_bytes, crossings(s, range(len(self.devices)))
        return [
            "none" if a == b else fastest_codec(machine, s.precision, a, b, middle, worth=WORTH_PACKING)
            for a, b in pairs
        ]

    def _streamed(self, machine: Machine) -> Plan:
        sample, _ = self.sample(self.settings.parts)
        request = self._streaming(machine)
        return request.plan(
            max_microbatches=batch_rows(self._batch[0]), rows=batch_rows(sample), tokens=tokens_of(sample)
        )

    def _streaming(self, machine: Machine) -> StreamingRequest:
        costs, loss = self.costs(self.settings.parts)
        loss = plain_loss(costs[-1], self.settings.precision) if loss is None else loss
        return StreamingRequest(tuple(costs), loss, machine, self.settings, self.tiers)

    def _check_enough_layers(self) -> None:
        devices, layers, each = len(self.devices), len(self.layers), self.settings.stages_per_rank
        if devices * each > layers:
            on_each = f" with {each} stages on each" if each > 1 else ""
            why = next((text for layer in self.layers if (text := getattr(layer.module, "why_so_few", ""))), "")
            most = layers // each
            raise ValueError(
                f"{devices} devices{on_each} for {layers} layer{'s' * (layers != 1)}: every stage needs a layer; "
                f"pass at most {most} device{'s' * (most != 1)}{why and f' ({why})'}"
            )

    def checked(self, plan: Plan, inputs: Any, targets: Any, *, measure: bool) -> Plan:
        """Check a plan that was made elsewhere, and return it, with its seconds measured here if asked.

        Raises:
            ValueError: it is for another model, other devices, settings or smaller batches, or over a budget.
        """
        self._batch = inputs, targets
        self._defers = self._defers or schedules.splits_backward(plan.settings.schedule)
        check_plan(plan, [layer.name for layer in self.layers], self.devices, self.settings)
        sample, _ = self.sample(plan.settings.parts)
        check_fits(plan, self.devices, batch_rows(sample), tokens_of(sample), self.tiers)
        return self.measured(plan) if measure else plan

    def measured(self, plan: Plan) -> Plan:
        """Return the same placement with seconds that rest on measured layers."""
        return self._fixed(plan, self.times(plan.settings.parts))

    def after_step(self, plan: Plan, timeline: Timeline) -> tuple[Plan, Plan]:
        """Plan from what a step has measured: return the placement as it is, and the fastest found.

        The layers' seconds are scaled so that every stage takes as long as it took. On a device where a layer has not
        run it is assumed to be off its expected time by the same factor as all that has run there.

        Args:
            plan: the one that the step ran by.
            timeline: of the step.
        """
        scaled = self._corrected(plan, timeline)
        same = self._fixed(plan, scaled(plan.settings.parts))
        s = self.settings
        if plan.streaming is not None:  # there is one order
            return same, same
        wanted = s if s.microbatches == AUTO else replace(s, microbatches=plan.settings.microbatches)
        own = schedules.stages_per_rank(plan.settings.schedule)
        if plan.virtual != own or batch_rows(self._batch[0]) % plan.settings.parts:
            return same, self._fixed(plan, scaled(plan.settings.parts), move=True)
        return same, self._searched(scaled, wanted)

    def for_batch(self, inputs: Any, targets: Any, plan: Plan) -> Planner:
        """Return a planner of other batches, which keeps what a plan recomputes and into how many microbatches it cuts
        them at least.
        """
        settings = replace(self.settings, microbatches=plan.settings.microbatches)
        if self.settings.recompute.mode == AUTO and plan.recomputed_layers == frozenset(range(len(self.layers))):
            settings = replace(settings, recompute=Recompute("all"))
        other = Planner(self.layers, self.devices, settings, self.loss_fn, self.tiers)
        other._batch = inputs, targets
        return other

    @property
    def can_stream(self) -> bool:
        """Whether there is a tier from which the devices could stream the layers."""
        return self._streaming(counted_machine(self.devices, self.settings.precision)).possible

    def streamed(self, settings: Settings) -> Plan:
        """Return the plan, from counted costs, that streams the layers with these settings.

        Raises:
            BudgetError, ValueError: nothing fits, or the settings do not allow it.
        """
        other = Planner(self.layers, self.devices, settings, self.loss_fn, self.tiers)
        other._batch, other._costs = self._batch, self._costs
        return other._streamed(counted_machine(self.devices, settings.precision))

    def times(self, parts: int) -> Times:
        """Return measured seconds of every layer and the loss, for a batch cut into ``parts`` microbatches."""
        if parts not in self._times:
            sample, wanted = self.sample(parts)
            loss = self.loss_fn if wanted is not None else no_loss
            s = self.settings
            self._times[parts] = time_layers(
                self.layers, sample, wanted, self.devices, loss, precision=s.precision, fused=s.fused
            )
        return self._times[parts]

    def costs(self, parts: int) -> tuple[list[LayerCost], LayerCost | None]:
        """Return counted costs of every layer and the loss, for a batch cut into ``parts`` microbatches."""
        if parts not in self._costs:
            sample, wanted = self.sample(parts)
            dtype, fused = DTYPES[self.settings.precision], self.settings.fused
            self._costs[parts] = model_costs(
                self.layers,
                sample,
                dtype,
                fused=fused,
                loss_fn=self.loss_fn,
                targets=wanted,
                device_type=device_type_of(self.devices),
                deferred=self._defers,
            )
        return self._costs[parts]

    def sample(self, parts: int) -> tuple[Any, Any]:
        """Return one microbatch of inputs and of targets."""
        inputs, targets = self._batch
        sample = split_inputs(inputs, parts)[0]
        return sample, None if targets is None else split_batch(targets, parts, "targets")[0]

    @cached_property
    def _machine(self) -> Machine:
        """The devices, with what was measured of updates, packing, the links of GPUs and the disk."""
        s, devices = self.settings, self.devices
        update, packing = time_update(devices, DTYPES[s.precision], s.state), [math.inf] * len(devices)
        if s.codec != "none":
            packing = time_packing(devices, DTYPES[s.precision], s.codec)
        machine = counted_machine(devices, s.precision) if self._given is None else self._given
        links = {
            (a, b): measure_link(devices[a], devices[b]).bytes_per_s
            for a, b in machine.links
            if "cuda" in (devices[a].torch_device.type, devices[b].torch_device.type)
        }
        known = zip(machine.speeds, update, packing)
        speeds = tuple(replace(speed, update_rate=moved, pack_rate=packed) for speed, moved, packed in known)
        folder = None if s.residency == "resident" else self.tiers.disk
        disk = machine.disk if folder is None else time_disk(folder)
        gpus = [device for device in devices if device.torch_device.type == "cuda"]
        duplex = time_duplex(gpus[0]) if gpus and s.residency != "resident" else machine.duplex
        return replace(machine, speeds=speeds, links={**machine.links, **links}, disk=disk, duplex=duplex)

    def _fixed(self, plan: Plan, times: Times, *, move: bool = False) -> Plan:
        """Return the plan with these seconds; with ``move`` its stages are placed by them."""
        costs, loss = self.costs(plan.settings.parts)
        if plan.streaming is not None:
            loss = plain_loss(costs[-1], plan.settings.precision) if loss is None else loss
            return predict_streaming(plan, costs, loss, self._machine, self.tiers, list(map(tuple, times)))
        recompute = self.settings.recompute if move else Recompute("given", plan.recomputed_layers)
        made = make_plan(
            costs,
            self._machine,
            replace(plan.settings, recompute=recompute),
            loss_cost=loss,
            codecs=plan.codecs,
            model=plan.model,
            times=times,
            layers=None if move else [stage.layers for stage in plan.stages],
            rows=plan.rows,
            tokens=plan.tokens,
        )
        return replace(made, settings=plan.settings)

    def _searched(self, times_of: Callable[[int], Times], settings: Settings) -> Plan:
        rows = batch_rows(self._batch[0])
        sample, _ = self.sample(1)
        return search_plan(
            lambda own: self._whole_costs(rows // own),
            self._machine,
            Settings.part_of(settings),
            batch=rows,
            tokens=tokens_of(sample),
            same_order=True,
            one_process=True,
            times_of=lambda own: list(map(tuple, times_of(rows // own))),
            tiers=self.tiers,
        )

    def _whole_costs(self, parts: int) -> tuple[list[LayerCost], LayerCost]:
        costs, loss = self.costs(parts)
        if loss is None:
            raise ValueError(
                'schedule="auto" and microbatches="auto" need a sample of targets: prepare(inputs, targets)'
            )
        return costs, loss

    def _corrected(self, plan: Plan, timeline: Timeline) -> Callable[[int], Times]:
        """Return `times`, scaled to the seconds that the stages of a measured step took."""
        parts = plan.settings.parts
        expected, measured = self._fixed(plan, self.times(parts)), timeline.mean_durations()
        own: dict[tuple[int, int], tuple[float, float]] = {}  # by device and layer, the loss last
        whole = [[0.0, 0.0] for _ in self.devices]
        for index, stage in enumerate(expected.stages):
            device = plan.devices.index(stage.device)
            took_forward = measured[index, "F"]
            took_backward = measured.get((index, "B"), 0.0) or measured[index, "I"] + measured[index, "W"]
            factors = _ratio(took_forward, stage.forward_s), _ratio(took_backward, stage.backward_s)
            last = [len(self.layers)] if index == len(expected.stages) - 1 else []
            own.update({(device, k): factors for k in [*range(*stage.layers), *last]})
            whole[device][0] += took_forward + took_backward
            whole[device][1] += stage.forward_s + stage.backward_s
        overall = [_ratio(*pair) for pair in whole]

        def scaled(other_parts: int) -> Times:
            result = []
            for device, row in enumerate(self.times(other_parts)):
                factors = [own.get((device, k), (overall[device],) * 2) for k in range(len(row))]
                result.append([(f * a, b * c) for (f, b), (a, c) in zip(row, factors)])
            return result

        return scaled


def _ratio(took: float, expected: float) -> float:
    return took / expected if expected > 0.0 and took > 0.0 else 1.0


def check_made(layers: Sequence[Layer]) -> None:
    """Raise ValueError where a parameter or buffer of a lazy module has no shape yet; name it."""
    for layer in layers:
        for name, tensor in itertools.chain(layer.module.named_parameters(), layer.module.named_buffers()):
            if torch.nn.parameter.is_lazy(tensor):
                kind = type(layer.module).__name__
                raise ValueError(
                    f"layer {layer.name!r} has a parameter without a shape yet, {name!r} of a {kind}: call the model "
                    "once on a sample batch, model(inputs), before it is given to the trainer"
                )


def counted_machine(devices: Sequence[Device], precision: str) -> Machine:
    """Return the machine that counted costs are balanced over: links, packing and updates take no time.

    CPUs have nominal speeds, in proportion to their threads, so that the same command gives the same stages every time.
    As soon as there is a GPU, every device has its measured speed.
    """
    links = dict.fromkeys(itertools.permutations(range(len(devices)), 2), math.inf)
    if all(device.torch_device.type == "cpu" for device in devices):
        nominal = tuple(Speed(5e10 * device.threads, 5e9 * device.threads) for device in devices)
        return Machine(tuple(devices), nominal, links, {device.name: "50 GFLOP/s a thread" for device in devices})
    measured = [measure_device(device) for device in devices]
    speeds = tuple(Speed(max(getattr(m, precision), 1.0), m.memory_bandwidth) for m in measured)
    return Machine(tuple(devices), speeds, links)


def no_loss(outputs: Any, targets: Any) -> torch.Tensor:
    """Replace the loss where there are no targets."""
    return outputs.float().mean()


def tokens_of(sample: Any) -> int:
    """Return the tokens of a sequence, where the sample is of token ids; else 0."""
    ids = sample.get("input_ids") if isinstance(sample, dict) else sample
    return int(ids.shape[1]) if isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.is_floating_point() else 0
