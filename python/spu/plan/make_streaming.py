"""Making a plan for a model that is larger than its devices: its layers move between tiers, one stage after another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from spu.common.units import format_bytes, format_bytes_up
from spu.plan.check import used_devices
from spu.plan.layer_cost import LayerCost
from spu.plan.machine import Machine
from spu.plan.partition import best_cuts, runs, sums_between
from spu.plan.placement import Placement
from spu.plan.plan import Plan
from spu.plan.refusal import BudgetError, shrunk
from spu.plan.request import Request, Times, crossings
from spu.plan.streamed import Streamed
from spu.settings import AUTO, STATES, Recompute, Settings

if TYPE_CHECKING:
    from spu.devices.tiers import Tiers

__all__ = ["StreamingRequest", "grouped", "predict_streaming"]

_SLOTS = (2, 3, 4)
_WIDENED = 6  # ways, the fastest with few slots, that are tried with more


def grouped(layers: Sequence[LayerCost]) -> list[range]:
    """Return runs of layers, each with at most as many parameters together as the largest layer alone."""
    most = max(layer.param_count for layer in layers)
    cuts, count = [0], 0
    for k, layer in enumerate(layers):
        if k > cuts[-1] and count + layer.param_count > most:
            cuts.append(k)
            count = 0
        count += layer.param_count
    return [range(first, stop) for first, stop in itertools.pairwise([*cuts, len(layers)])]


@dataclass(frozen=True)
class StreamingRequest:
    """What is to be streamed.

    Attributes:
        layers, loss: costs for one microbatch, in the precision of the training.
        machine: its fastest GPUs compute, one or several; its CPUs where there is none.
        settings: of the training; the schedule is `layer_outer` whatever they say, with a stage for each layer.
        tiers: what there is below the devices.
        measured: (forward, backward) seconds of every layer, and last of the loss, on every device; default: counted
            work at the machine's speeds.
    """

    layers: tuple[LayerCost, ...]
    loss: LayerCost
    machine: Machine
    settings: Settings
    tiers: Tiers
    measured: Sequence[Times] | None = None

    @cached_property
    def below(self) -> Tiers:
        """The tiers below the devices that compute."""
        return self.tiers.beside(self.machine.devices)

    @property
    def possible(self) -> bool:
        """Whether there is a tier below a device, and the settings are such that one run is a step."""
        return self.settings.accumulate == 1 and bool(self._stores) and any(True for _ in self._placements())

    def check(self) -> None:
        """Raise ValueError where the settings ask for what streaming does not do, or nothing would move."""
        s = self.settings
        if s.accumulate != 1:
            raise ValueError(
                f"{s.label('accumulate')} {s.accumulate}: a streamed model runs all microbatches of a step through a "
                f"layer at once, so raise microbatches instead: {s.run_microbatches * s.accumulate} of them"
            )
        if s.activations not in (AUTO, "keep") and str(s.recompute) == "off":
            raise ValueError(
                f"{s.label('activations')} {s.activations} moves inputs of recomputed layers, but recompute is off: "
                "turn it on, or keep activations"
            )
        if not self._stores:
            device = self.machine.devices[self.orders[0][0]].name
            what = "disk=FOLDER:100GB" if device.startswith("cpu") else "cpu=32GB or disk=FOLDER:100GB"
            raise ValueError(
                f"{s.label('residency')} {s.residency} would move nothing: there is no tier below {device}. Give one: "
                f"{what}, in the budget or as tiers="
            )
        if not any(True for _ in self._placements()):
            count = len(self.orders[0])
            raise ValueError(
                f"{s.label('residency')} {s.residency} cannot share these {len(self.layers)} layers among {count} "
                "devices: there are too few, or layers that share parameters would be on different devices. Give one "
                "device (cpu has all cores)"
            )

    @cached_property
    def orders(self) -> list[tuple[int, ...]]:
        """The devices that may compute, in turn: the fastest GPU, of equal ones the largest, and two or more of the
        fastest ones; all CPUs where there is none.
        """
        devices, speeds = self.machine.devices, self.machine.speeds
        gpus = [k for k, device in enumerate(devices) if not device.name.startswith("cpu")]
        best = sorted(gpus, key=lambda k: (-speeds[k].flops, -devices[k].budget_bytes))
        return [tuple(sorted(best[: k + 1])) for k in range(len(best))] or [tuple(range(len(devices)))]

    @cached_property
    def _stores(self) -> list[str]:
        """The tiers that can hold what the devices stream."""
        on_gpu = not self.machine.devices[self.orders[0][0]].name.startswith("cpu")
        host, disk = self.below.host_bytes > 0, self.below.disk is not None
        return (["host"] if on_gpu and host else []) + (["disk"] if disk and (host or not on_gpu) else [])

    def cases(self) -> Iterator[Streamed]:
        """Yield every way that the settings allow, with few slots, the simplest first."""
        s = self.settings
        residencies = ("offloaded", "streamed") if s.residency == AUTO else (s.residency,)
        activations = ("keep", "exact") if s.activations == AUTO else (s.activations,)
        for placed in self._placements():
            for residency, store, waits in itertools.product(residencies, self._stores, activations):
                if waits != "keep" and not any(placed.recomputed):
                    continue  # only the inputs of recomputed layers wait below
                for slots in _SLOTS if residency == "streamed" else _SLOTS[:1]:
                    for state_slots in (1, 2):
                        yield Streamed(placed, self.below, residency, store, slots, state_slots, waits)

    def _placements(self) -> Iterator[Placement]:
        """Yield the stages on devices with the layers that may be recomputed: none, all, or those that are given."""
        s, count = self.settings, len(self.layers)
        none, every = frozenset[int](), frozenset(range(count))
        sets = {"none": [none], "all": [every], "given": [s.recompute.layers], "auto": [none, every]}
        for order in self.orders:
            for parts in self._parts(order):
                request = self._request(order, len(parts) // len(order))
                for layers in sets[s.recompute.mode]:
                    recomputed = tuple(tuple(k for k in part if k in layers) for part in parts)
                    yield Placement(request, tuple(parts), recomputed)

    def _request(self, order: tuple[int, ...], virtual: int) -> Request:
        settings = replace(self.settings, schedule="layer_outer", virtual=virtual)
        codecs = tuple(self.settings.codec if a != b else "none" for a, b in crossings(settings, order))
        return Request(self.machine, order, self.layers, self.loss, self.measured, settings, codecs)

    def _parts(self, order: tuple[int, ...]) -> Iterator[list[range]]:
        """Yield the layers of each stage: on one device as many parameters as the largest layer has; on several, which
        take the stages in turn, layers in proportion to their speeds, so that none waits for another.
        """
        if len(order) == 1:
            yield grouped(self.layers)
            return
        count = len(order)
        for virtual in self._turns(order):
            times = self._request(order, virtual).times
            tables = [self._seconds(times[k % count], last=k == virtual * count - 1) for k in range(virtual * count)]
            for cuts in best_cuts(tables, ()):
                parts = [range(first, stop) for first, stop in itertools.pairwise(cuts)]
                if self._ties_stay(parts, count):
                    yield parts

    def _turns(self, order: tuple[int, ...]) -> list[int]:
        """Return numbers of stages on each device that are worth trying: so many that a stage has as many parameters as
        the largest layer; so few that the slowest device's are as small and the others' in proportion; as many as can
        be.
        """
        groups, most = len(grouped(self.layers)), len(self.layers) // len(order)
        rates = [1.0 / (sum(map(sum, times)) or 1.0) for times in self._request(order, 1).times]
        even, shares = -(-groups // len(order)), round(groups * min(rates) / sum(rates))
        return sorted({min(max(virtual, 1), most) for virtual in (shares, even, (even + most) // 2, most)} - {0})

    def _seconds(self, times: Times, *, last: bool) -> np.ndarray:
        """Return the seconds of every run of layers on a device, forward and backward."""
        own = sums_between(np.array([sum(pair) for pair in times[:-1]]))
        own[:, -1] += sum(times[-1]) * last
        return np.where(runs(len(self.layers)), own, math.inf)

    def _ties_stay(self, parts: Sequence[range], count: int) -> bool:
        """Tell whether layers that share parameters are on the same device, where stages take turns on so many."""
        rank = {layer: index % count for index, part in enumerate(parts) for layer in part}
        return all(rank[k] == rank[earlier] for k, cost in enumerate(self.layers) for earlier, *_ in cost.ties)

    def plan(self, *, model: str = "", rows: int = 0, tokens: int = 0, max_microbatches: int | None = None) -> Plan:
        """Return the fastest plan that moves layers between tiers and keeps every budget.

        Args:
            model, rows, tokens: noted in the plan.
            max_microbatches: the batch cannot be cut into more, so that no refusal advises it.

        Raises:
            BudgetError: nothing fits; says which tiers are short by how much, and what was tried and fits.
            ValueError: settings that streaming cannot serve, or no tier below the device.
        """
        self.settings.recompute.check_within(len(self.layers))
        self.check()
        best = self.best()
        if best is None:
            raise self.refusal(max_microbatches)
        return best.plan(model=model, rows=rows, tokens=tokens)

    def best(self) -> Streamed | None:
        """Return the fastest way that fits every tier; of equally fast ones the simplest."""
        fitting = [case for case in self.cases() if not case.lacking]
        fastest = sorted((case for case in fitting if case.residency == "streamed"), key=lambda case: case.step_s)
        ways = {(case.placed.parts, case.placed.recomputed, case.activations): case for case in reversed(fastest)}
        several = sorted(ways.values(), key=lambda case: case.step_s)[:_WIDENED]
        fitting += itertools.chain.from_iterable(map(_with_more_slots, several))
        return min(fitting, key=lambda case: float(f"{case.step_s:.2e}"), default=None)

    def refusal(self, most: int | None = None) -> BudgetError:
        """Return the error that says which tiers are short in the way that comes nearest, and what would fit.

        Args:
            most: the batch cannot be cut into more microbatches.
        """
        near = min(self.cases(), key=lambda case: sum(case.lacking.values()))
        s, lacking = near.placed.request.settings, near.lacking
        needs, bound = {tier.name: tier for tier in near.tier_bytes}, near.needed
        through = " and ".join(device.name for device in near.placed.request.devices)
        fixes = [label for label, changed in self._changes(most) if changed.best() is not None]
        fixes.append("budgets of " + ", ".join(f"{format_bytes_up(bound[name])} for {name}" for name in lacking))
        lines = [
            f"{name} is short by {format_bytes_up(short)}: needs {format_bytes(bound[name])} and may use "
            f"{format_bytes(needs[name].budget_bytes)}"
            for name, short in lacking.items()
        ]
        how = f"{near.residency} through {through}, {s.microbatches_in_words}, {s.precision}, state {s.state}"
        how += f", grads {s.grads}"
        text = "\n  ".join([f"no plan fits the budgets ({how}); the nearest one is short:", *lines])
        text += "\n  ".join(["\nwhat would fit:", *fixes])
        worst = max(lacking, key=lacking.__getitem__)
        budget = needs[worst].budget_bytes
        return BudgetError(text, stage=0, needed_bytes=bound[worst], budget_bytes=budget, device=worst, fixes=fixes)

    def _changes(self, most: int | None) -> Iterator[tuple[str, StreamingRequest]]:
        """Yield changes of one setting that take less memory."""
        s = self.settings
        for state in STATES[STATES.index(s.state) + 1 :]:
            yield f'state="{state}"', replace(self, settings=replace(s, state=state))
        if s.grads == "fp32":
            yield 'grads="bf16"', replace(self, settings=replace(s, grads="bf16"))
        if s.activations not in (AUTO, "exact"):
            yield 'activations="exact"', replace(self, settings=replace(s, activations="exact"))
        if s.activations != "int8":
            yield 'activations="int8"', replace(self, settings=replace(s, activations="int8"))
        if s.residency == "offloaded":
            yield 'residency="streamed"', replace(self, settings=replace(s, residency="streamed"))
        if s.recompute.mode in ("none", "given"):
            yield "recompute=True", replace(self, settings=replace(s, recompute=Recompute("all")))
        for factor in (2, 4, 8):
            count = factor * s.run_microbatches
            if most is not None and count > most:
                return
            layers = tuple(shrunk(layer, factor) for layer in self.layers)
            finer = replace(self, layers=layers, loss=shrunk(self.loss, factor))
            label = f"microbatches={count} (of the same batch, so each 1/{factor} as large)"
            yield label, replace(finer, settings=replace(s, microbatches=count))


def _with_more_slots(case: Streamed) -> Iterator[Streamed]:
    """Yield a streamed way with more slots in steps of a quarter, as far as they fit and stages have none of their own.

    What is in a slot when its stage's next visit comes is not fetched again: slots are what more memory is good for.
    """
    stages, slots = len(case.placed.parts) // case.ranks, case.slots
    for state_slots in (1, 2):
        more = replace(case, slots=max(slots, 4), state_slots=state_slots)
        while more.slots < stages and not more.lacking:
            more = replace(more, slots=min(stages, more.slots + more.slots // 4))
            if not more.lacking:
                yield more


def predict_streaming(
    plan: Plan,
    layer_costs: Sequence[LayerCost],
    loss: LayerCost,
    machine: Machine,
    tiers: Tiers,
    times: Sequence[Times] | None = None,
) -> Plan:
    """Return a streamed plan as it is, predicted from other costs, speeds or times.

    Raises:
        ValueError: its stages have different residencies.
    """
    assert plan.streaming is not None
    s = plan.streaming
    if len(set(s.residency)) > 1:
        raise ValueError(f"streaming.residency is {s.residency}: give all stages the same one")
    names = [device.name for device in used_devices(plan, machine.devices)]
    order = tuple([device.name for device in machine.devices].index(name) for name in names)
    settings = replace(plan.settings, virtual=plan.virtual)
    request = Request(machine, order, tuple(layer_costs), loss, times, settings, plan.codecs)
    placed = Placement(request, tuple(range(*x.layers) for x in plan.stages), tuple(x.recompute for x in plan.stages))
    case = Streamed(
        placed, tiers.beside(machine.devices), s.residency[0], s.store, s.slots, s.state_slots, s.activations
    )
    return replace(case.plan(model=plan.model, rows=plan.rows, tokens=plan.tokens), settings=plan.settings)
