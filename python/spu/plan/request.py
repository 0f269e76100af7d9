"""Everything that decides a plan, and from it the search's problem and a partition's bytes and times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

from spu import schedules
from spu.plan import core
from spu.plan.in_flight import actions_of, held_moments, held_together, in_flight_of, skeleton_of
from spu.plan.layer_cost import LayerCost
from spu.plan.machine import Machine, Speed
from spu.plan.memory import Boundary, MicrobatchBytes, StageBytes, StageMemory, state_bytes, wire_bytes
from spu.schedules import Action
from spu.schedules.simulate import _runner
from spu.settings import Settings

if TYPE_CHECKING:
    from spu.devices.manager import Device

__all__ = ["UPDATE_BYTES", "Placement", "Request", "Times", "crossings"]

_CORE = {"none": core.NONE, "all": core.ALL, "auto": core.AUTO, "given": core.NONE}
"""The core's numbers for the modes of `Recompute`; given layers are not for it to choose."""

UPDATE_BYTES = 38
"""Memory traffic per trained parameter at the end of a step: the norm reads 4 bytes, AdamW reads and writes 34."""


Times = tuple[tuple[float, float], ...]
"""(forward, backward) seconds of every layer, and last of the loss, for one microbatch on one device."""


def crossings(settings: Settings, order: Sequence[int]) -> list[tuple[int, int]]:
    """The devices on both sides of every stage boundary, where the ranks are the devices of ``order``."""
    homes = schedules.stage_ranks(settings.schedule, len(order), settings.stages_per_rank)
    return [(order[a], order[b]) for a, b in pairwise(homes)]


@dataclass(frozen=True)
class Placement:
    """A partition with everything decided.

    Attributes:
        parts: layers of each stage.
        recomputed: layers of each stage that are recomputed in the backward.
    """

    parts: tuple[range, ...]
    recomputed: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Request:
    """Everything that decides a plan.

    Attributes:
        layers, loss: what they cost.
        times: of the layers on each rank.
        devices, speeds: one per rank.
        settings: of the training, with a schedule and a number of microbatches.
        codecs: one per boundary.
        links: bytes per second over each boundary.
        fixed: boundaries that are given.
    """

    layers: tuple[LayerCost, ...]
    loss: LayerCost
    times: tuple[Times, ...]
    devices: tuple[Device, ...]
    speeds: tuple[Speed, ...]
    settings: Settings
    codecs: tuple[str, ...]
    links: tuple[float, ...]
    fixed: tuple[range, ...] | None = None

    def changed(self, **settings: Any) -> Request:
        """Return the same request with other settings."""
        return replace(self, settings=replace(self.settings, **settings))

    @classmethod
    def on(
        cls,
        machine: Machine,
        order: Sequence[int],
        layers: Sequence[LayerCost],
        loss: LayerCost,
        times: Sequence[Sequence[tuple[float, float]]] | None,
        settings: Settings,
        codecs: Sequence[str],
        fixed: tuple[range, ...] | None = None,
    ) -> Request:
        """A request for the machine's devices in this order.

        Args:
            times: as measured, on each of the machine's devices; None: of counted work at the machine's speeds.
        """
        if times is None:
            rates = zip(machine.flops, machine.bandwidths, strict=True)
            times = [[cost.seconds(*rate) for cost in (*layers, loss)] for rate in rates]
        return cls(
            layers=tuple(layers),
            loss=loss,
            times=tuple(tuple(times[k]) for k in order),
            devices=tuple(machine.devices[k] for k in order),
            speeds=tuple(machine.speeds[k] for k in order),
            settings=settings,
            codecs=tuple(codecs),
            links=tuple(machine.link(a, b) for a, b in crossings(settings, order)),
            fixed=fixed,
        )

    @cached_property
    def homes(self) -> list[int]:
        """The rank of each stage."""
        return schedules.stage_ranks(self.settings.schedule, len(self.devices), self.settings.virtual)

    @cached_property
    def actions(self) -> list[list[Action]]:
        """One run of the schedule."""
        return actions_of(*self._schedule)

    @cached_property
    def boundaries(self) -> list[Boundary]:
        """How each stage boundary is crossed."""
        on_gpu = [not self.devices[home].name.startswith("cpu") for home in self.homes]
        result = []
        for k, codec in enumerate(self.codecs):
            same = self.homes[k] == self.homes[k + 1]
            shared = same or not (on_gpu[k] or on_gpu[k + 1])
            result.append(Boundary(codec, codec != "none" or not shared, on_gpu[k], on_gpu[k + 1]))
        return result

    @cached_property
    def memory(self) -> StageMemory:
        return StageMemory(
            self.layers,
            self.loss,
            in_flight=in_flight_of(*self._schedule),
            boundaries=self.boundaries,
            precision=self.settings.precision,
            deferred=schedules.splits_backward(self.settings.schedule),
        )

    def problem(self, budgets: Sequence[int] | None = None) -> core.Problem:
        """The search's arrays; ``budgets`` per stage, default an equal share of its device's."""
        p, count, stages = self.settings.precision, len(self.layers), len(self.homes)
        memory, last = self.memory, len(self.homes) - 1
        width = count + 1
        fixed = [sum(state_bytes(layer, p, k)) for k, layer in enumerate(self.layers)]
        own = [layer.own_bytes + (layer.deferred_bytes if memory.deferred else 0) for layer in self.layers]
        before = [self.layers[k - 1] if k else None for k in range(count)]
        inner = [
            layer.input_bytes if layer.input_saved or (back is not None and back.output_saved) else 0
            for layer, back in zip(self.layers, before)
        ]
        ends: dict[str, list] = {name: [0] * (stages * width) for name in core.END_BYTES}
        ends |= {name: [0.0] * (stages * width) for name in ("enter_s", "leave_s")}
        for s in range(stages):
            at = slice(s * width, (s + 1) * width)
            for name, values in {**self._entering(s), **self._leaving(s, last)}.items():
                ends[name][at] = values
        # A first stage has whatever is before its end, a last one whatever is behind its beginning; between them a
        # parameter counts as another stage's, though a middle stage may have it all to itself.
        for end in range(width) if any(layer.ties for layer in self.layers) else ():
            ends["leave_fixed"][end] -= self._together(0, end)
            if last:
                ends["enter_fixed"][last * width + end] -= self._together(end, count)
        if budgets is None:
            budgets = [self.devices[home].budget_bytes // self.settings.stages_per_rank for home in self.homes]
        return core.Problem(
            layers=count,
            stages=stages,
            recompute=_CORE[self.settings.recompute.mode],
            forward=[self.times[home][k][0] for home in self.homes for k in range(count)],
            backward=[self.times[home][k][1] for home in self.homes for k in range(count)],
            fixed=fixed,
            own=own,
            inner=inner,
            inner_recomputed=[layer.input_bytes for layer in self.layers],
            extra=[layer.extra_bytes for layer in self.layers],
            extra_recomputed=[layer.extra_bytes + layer.own_bytes for layer in self.layers],
            in_flight=list(memory.in_flight),
            budgets=list(budgets),
            **ends,
        )

    def _together(self, first: int, stop: int) -> int:
        """Bytes that layers ``first`` to ``stop - 1`` of one stage do not take, as they share parameters."""
        return sum(
            sum(state_bytes(layer, self.settings.precision, k))
            - sum(state_bytes(layer, self.settings.precision, first))
            for k, layer in enumerate(self.layers[first:stop], first)
            if layer.ties
        )

    def _entering(self, stage: int) -> dict[str, list]:
        """What it adds to a stage to begin at each cut between layers: [L + 1] each."""
        if stage == 0:
            return {}
        boundary, rate = self.boundaries[stage - 1], self.speeds[self.homes[stage]].pack_rate
        copied = boundary.copied
        wires = {
            size: boundary.wires(size, self.settings.precision)[1] for size in {x.input_bytes for x in self.layers}
        }
        return {
            "enter_fixed": [*(wires[layer.input_bytes] for layer in self.layers), 0],
            "enter_each": [*(x.input_bytes if copied and x.input_saved else 0 for x in self.layers), 0],
            "enter_recomputed": [*(layer.input_bytes if copied else 0 for layer in self.layers), 0],
            "enter_s": [*(boundary.s_per_microbatch(layer.input_bytes, rate) for layer in self.layers), 0.0],
        }

    def _leaving(self, stage: int, last: int) -> dict[str, list]:
        """What it adds to a stage to end at each cut between layers: [L + 1] each."""
        if stage < last:
            boundary, rate = self.boundaries[stage], self.speeds[self.homes[stage]].pack_rate
            wires = {
                size: boundary.wires(size, self.settings.precision)[0] for size in {x.output_bytes for x in self.layers}
            }
            return {
                "leave_fixed": [0, *(wires[layer.output_bytes] for layer in self.layers)],
                "leave_each": [0, *(layer.output_bytes for layer in self.layers)],
                "leave_s": [0.0, *(boundary.s_per_microbatch(layer.output_bytes, rate) for layer in self.layers)],
            }
        loss, count = self.loss, len(self.layers)
        kept = loss.input_saved or self.layers[-1].output_saved
        return {
            "leave_each": [0] * count + [loss.own_bytes + (loss.input_bytes if kept else 0)],
            "leave_extra": [0] * count + [max(loss.forward_extra_bytes + loss.input_bytes, loss.backward_extra_bytes)],
            "leave_s": [0.0] * count + [sum(self.times[self.homes[stage]][count])],
        }

    def candidates(self, slacks: Sequence[float] = ()) -> list[Placement]:
        """Partitions within the budgets, the one with the fastest slowest stage first; none if nothing fits."""
        if self.fixed is not None:
            placed = self.placed([self.fixed[0].start, *(part.stop for part in self.fixed)])
            return [placed] if self.fits(placed) else []
        if len(self.homes) > len(self.layers):
            return []
        shares: list[list[int] | None] = [None]
        if (
            self.settings.stages_per_rank > 1
        ):  # stages that peak at different times may share a device though equal shares are too small
            shares.append([self.devices[home].budget_bytes for home in self.homes])
        for budgets in shares:
            problem = self.problem(budgets)
            found = [self.placed(cuts, problem) for cuts in core.place(problem, slacks)]
            fitting = [placed for placed in found if self.fits(placed)]
            if not fitting:
                starts = [core.nearest(problem), *([0, *(p.stop for p in placed.parts)] for placed in found)]
                fitting = [near for cuts in starts for near in self._nearer(cuts, problem) if self.fits(near)]
            if fitting:
                return fitting
        return []

    def _nearer(self, cuts: Sequence[int], problem: core.Problem) -> list[Placement]:
        """Where moving boundaries one layer at a time leads, as long as the devices together lack less for it.

        The programme knows a share of its device's budget for each stage; only here do a device's stages share it.
        """

        def lacking(placed: Placement) -> int:
            return sum(max(peak - device.budget_bytes, 0) for peak, device in zip(self.peaks(placed), self.devices))

        best = self.placed(cuts, problem)
        least = lacking(best)
        for _ in range(len(self.layers) if self.settings.stages_per_rank > 1 else 0):
            ends = [0, *(part.stop for part in best.parts)]
            moved = [
                self.placed([*ends[:k], ends[k] + step, *ends[k + 1 :]], problem)
                for k, step in product(range(1, len(ends) - 1), (-1, 1))
                if ends[k - 1] < ends[k] + step < ends[k + 1]
            ]
            nearest = min(moved, key=lacking, default=best)
            if not least or lacking(nearest) >= least:
                break
            best, least = nearest, lacking(nearest)
        return [best]

    def placed(self, cuts: Sequence[int], problem: core.Problem | None = None) -> Placement:
        """The partition at these cuts, with the layers that are recomputed."""
        given = self.settings.recompute
        if given.mode == "given":
            parts = tuple(range(a, b) for a, b in pairwise(cuts))
            return Placement(parts, tuple(tuple(k for k in part if k in given.layers) for part in parts))
        scale = core.StageCosts(self.problem() if problem is None else problem)
        pairs = list(pairwise(cuts))
        recomputed = (tuple(sorted(scale.weigh(s, first, last).recomputed)) for s, (first, last) in enumerate(pairs))
        return Placement(tuple(range(a, b) for a, b in pairs), tuple(recomputed))

    def fits(self, placed: Placement) -> bool:
        """Whether every device's peak is within its budget."""
        return all(peak <= device.budget_bytes for peak, device in zip(self.peaks(placed), self.devices))

    def stage_bytes(self, placed: Placement) -> list[StageBytes]:
        """Bytes of every stage by category."""
        pairs = zip(placed.parts, placed.recomputed, strict=True)
        return [self.memory.of(s, part.start, part.stop, recomputed) for s, (part, recomputed) in enumerate(pairs)]

    def peaks(self, placed: Placement) -> list[int]:
        """The most bytes of every device: over its stages what they hold, and the largest workspace of one."""
        parts = list(zip(placed.parts, placed.recomputed, strict=True))
        each = [self.memory.bound(s, part.start, part.stop, recomputed) for s, (part, recomputed) in enumerate(parts)]
        held = [max(sum(each[s] * n for s, n in counts) for counts in row) for row in held_together(*self._schedule)]
        totals = self.stage_bytes(placed)
        return [
            held[rank]
            + sum(b.state_bytes + b.wire_bytes for b, home in zip(totals, self.homes) if home == rank)
            + max(b.workspace_bytes for b, home in zip(totals, self.homes) if home == rank)
            for rank in range(len(self.devices))
        ]

    def held(self, placed: Placement) -> list[MicrobatchBytes]:
        """What one microbatch holds on every stage."""
        pairs = zip(placed.parts, placed.recomputed, strict=True)
        return [self.memory.held(s, part.start, part.stop, recomputed) for s, (part, recomputed) in enumerate(pairs)]

    def saved(self, placed: Placement) -> list[int]:
        """The most bytes that microbatches hold on every stage between actions."""
        held, most = self.held(placed), [0] * len(self.homes)
        for row in held_moments(*self._schedule):
            for stage, kind, counts in row:
                own = next((full, left) for s, full, left in counts if s == stage)
                more = held[stage].left if kind == "W" else held[stage].each
                most[stage] = max(most[stage], own[0] * held[stage].each + own[1] * held[stage].left + more)
        return most

    def predicted_peaks(self, placed: Placement) -> list[int]:
        """The most bytes of every device as its actions come and go; at most what `peaks` holds against budgets."""
        totals, held = self.stage_bytes(placed), self.held(placed)
        result = []
        for rank, row in enumerate(held_moments(*self._schedule)):
            fixed = sum(b.state_bytes + b.wire_bytes for b, home in zip(totals, self.homes) if home == rank)
            most = 0
            for stage, kind, counts in row:
                others = sum(full * held[s].each + left * held[s].left for s, full, left in counts)
                most = max(most, others + (held[stage].left if kind == "W" else held[stage].most))
            result.append(fixed + most)
        return result

    def durations(self, placed: Placement) -> list[tuple[float, float, float]]:
        """(forward, input gradient, weight gradient) seconds of every stage."""
        result = []
        last = len(self.homes) - 1
        for s, (part, recomputed) in enumerate(zip(placed.parts, placed.recomputed, strict=True)):
            times = self.times[self.homes[s]]
            forward = math.fsum(times[k][0] for k in part)
            backward = math.fsum(times[k][1] for k in part) + math.fsum(times[k][0] for k in recomputed)
            weight = math.fsum(times[k][1] * self.layers[k].weight_share for k in part)
            packing = 0.0
            for cut, boundary in ((part.start, s - 1), (part.stop, s)):
                if 0 <= boundary < last:
                    size = self.layers[cut].input_bytes
                    rate = self.speeds[self.homes[s]].pack_rate
                    packing += self.boundaries[boundary].s_per_microbatch(size, rate) / 2
            if s == last:
                forward, backward = forward + times[-1][0], backward + times[-1][1]
            result.append((forward + packing, backward + packing - weight, weight))
        return result

    def transfers(self, placed: Placement) -> list[float]:
        """Seconds of one transfer over every boundary."""
        sizes = [self.layers[part.stop - 1].output_bytes for part in placed.parts[:-1]]
        result = []
        for size, boundary, rate in zip(sizes, self.boundaries, self.links, strict=True):
            result.append(wire_bytes(size, self.settings.precision, boundary.codec) / rate if boundary.copied else 0.0)
        return result

    def updates(self, placed: Placement) -> list[float]:
        """Seconds of the update of every stage."""
        trained = [sum(self.layers[k].trained_count for k in part) for part in placed.parts]
        return [UPDATE_BYTES * n / self.speeds[home].update_rate for n, home in zip(trained, self.homes)]

    def step_s(self, placed: Placement) -> float:
        """Seconds of a step: every run of the schedule, and the slowest device's update."""
        updates = [0.0] * len(self.devices)
        for update, home in zip(self.updates(placed), self.homes):
            updates[home] += update
        skeleton = skeleton_of(*self._schedule)
        seconds = [(f, i + w, i, w) for f, i, w in self.durations(placed)]
        own = [seconds[stage][kind] for stage, kind in zip(skeleton.stages, skeleton.kinds)]
        _, ends = _runner("auto")(*skeleton._replace(seconds=own, transfers=self.transfers(placed)))
        return self.settings.accumulate * max(ends) + max(updates)

    @property
    def _schedule(self) -> tuple[str, int, int, int]:
        s = self.settings
        return s.schedule, len(self.devices), s.run_microbatches, s.stages_per_rank
