"""Everything that decides a plan, and from it the search's problem and a partition's bytes and times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from spu import schedules
from spu.plan import core
from spu.plan.memory import Boundary, LayerNeeds, StageBytes, StageMemory, state_bytes, wire_bytes
from spu.schedules import Action

if TYPE_CHECKING:
    from spu.devices import Device

UPDATE_BYTES = 38
"""Memory traffic per trained parameter at the end of a step: the norm reads 4 bytes, AdamW reads and writes 34."""


@dataclass(frozen=True)
class Speed:
    """What is known of a device's speed, beside the times of layers on it.

    Attributes:
        update_rate: bytes per second at which the update moves `UPDATE_BYTES` per parameter; infinite if not known.
        pack_rate: bytes of tensor per second through pack or unpack; infinite if not known.
    """

    update_rate: float = math.inf
    pack_rate: float = math.inf


@dataclass(frozen=True)
class Placed:
    """A partition with everything decided.

    Attributes:
        parts: layers of each stage.
        again: layers of each stage that are run again in the backward.
    """

    parts: tuple[range, ...]
    again: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Request:
    """Everything that decides a plan.

    Attributes:
        layers, loss: what they need.
        times: [ranks][layers and the loss] (forward, backward) seconds of a microbatch on each device.
        devices, speeds: one per rank.
        schedule, virtual, microbatches, accumulate, precision: of the training.
        codecs: one per boundary.
        links: bytes per second over each boundary.
        recompute: `core.KEEP`, `core.AGAIN` or `core.AUTO`.
        fixed: boundaries that are given.
    """

    layers: tuple[LayerNeeds, ...]
    loss: LayerNeeds
    times: tuple[tuple[tuple[float, float], ...], ...]
    devices: tuple[Device, ...]
    speeds: tuple[Speed, ...]
    schedule: str
    virtual: int
    microbatches: int
    accumulate: int
    precision: str
    codecs: tuple[str, ...]
    links: tuple[float, ...]
    recompute: int
    fixed: tuple[range, ...] | None = None

    @cached_property
    def homes(self) -> list[int]:
        """The rank of each stage."""
        return schedules.stage_ranks(self.schedule, len(self.devices), self.virtual)

    @cached_property
    def actions(self) -> list[list[Action]]:
        """One run of the schedule."""
        return schedules.get(self.schedule)(len(self.devices), self.microbatches, virtual=self.virtual)

    @cached_property
    def boundaries(self) -> list[Boundary]:
        """How each stage boundary is crossed."""
        cards = [not self.devices[home].name.startswith("cpu") for home in self.homes]
        result = []
        for k, codec in enumerate(self.codecs):
            same = self.homes[k] == self.homes[k + 1]
            shared = same or not (cards[k] or cards[k + 1])
            result.append(Boundary(codec, codec != "none" or not shared, cards[k], cards[k + 1]))
        return result

    @cached_property
    def memory(self) -> StageMemory:
        return StageMemory(
            self.layers,
            self.loss,
            in_flight=schedules.peak_in_flight(self.actions),
            boundaries=self.boundaries,
            precision=self.precision,
            deferred=schedules.splits_backward(self.schedule),
        )

    def problem(self, budgets: Sequence[int] | None = None) -> core.Problem:
        """The search's arrays; ``budgets`` per stage, default an equal share of its device's."""
        p, count, stages = self.precision, len(self.layers), len(self.homes)
        memory, last = self.memory, len(self.homes) - 1
        width = count + 1
        fixed = [sum(state_bytes(layer, p)) for layer in self.layers]
        own = [layer.own_bytes + (layer.deferred_bytes if memory.deferred else 0) for layer in self.layers]
        before = [self.layers[k - 1] if k else None for k in range(count)]
        inner = [
            layer.input_bytes if layer.input_saved or (back is not None and back.output_saved) else 0
            for layer, back in zip(self.layers, before)
        ]
        ends: dict[str, list] = {name: [0] * (stages * width) for name in _END_BYTES}
        ends |= {name: [0.0] * (stages * width) for name in ("enter_s", "leave_s")}
        for s in range(stages):
            for cut in range(width):
                for name, value in self._ends(s, cut, last).items():
                    ends[name][s * width + cut] = value
        if budgets is None:
            budgets = [self.devices[home].budget_bytes // self.virtual for home in self.homes]
        return core.Problem(
            count,
            stages,
            self.recompute,
            [self.times[home][k][0] for home in self.homes for k in range(count)],
            [self.times[home][k][1] for home in self.homes for k in range(count)],
            fixed,
            own,
            inner,
            [layer.input_bytes for layer in self.layers],
            [max(layer.forward_extra, layer.backward_extra) for layer in self.layers],
            [max(layer.forward_extra, layer.backward_extra + layer.own_bytes) for layer in self.layers],
            list(memory.in_flight),
            list(budgets),
            *(ends[name] for name in (*_END_BYTES, "enter_s", "leave_s")),
        )

    def _ends(self, stage: int, cut: int, last: int) -> dict[str, float]:
        """What it adds to a stage to begin, or to end, at a cut between layers."""
        result: dict[str, float] = {}
        speed = self.speeds[self.homes[stage]]
        if stage > 0 and cut < len(self.layers):
            layer, boundary = self.layers[cut], self.boundaries[stage - 1]
            result["enter_fixed"] = boundary.wires(layer.input_bytes, self.precision)[1]
            result["enter_each"] = layer.input_bytes if boundary.copied and layer.input_saved else 0
            result["enter_again"] = layer.input_bytes if boundary.copied else 0
            result["enter_s"] = boundary.s_per_microbatch(layer.input_bytes, speed.pack_rate)
        if stage < last and cut > 0:
            layer, boundary = self.layers[cut - 1], self.boundaries[stage]
            result["leave_fixed"] = boundary.wires(layer.output_bytes, self.precision)[0]
            result["leave_each"] = layer.output_bytes
            result["leave_s"] = boundary.s_per_microbatch(layer.output_bytes, speed.pack_rate)
        elif stage == last and cut == len(self.layers):
            loss, layer = self.loss, self.layers[-1]
            kept = loss.input_saved or layer.output_saved
            result["leave_each"] = loss.own_bytes + (loss.input_bytes if kept else 0)
            result["leave_extra"] = max(loss.forward_extra + loss.input_bytes, loss.backward_extra)
            result["leave_s"] = sum(self.times[self.homes[stage]][len(self.layers)])
        return result

    def candidates(self, slacks: Sequence[float] = ()) -> list[Placed]:
        """Partitions within the budgets, the one with the fastest slowest stage first; none if nothing fits."""
        if self.fixed is not None:
            placed = self.placed([self.fixed[0].start, *(part.stop for part in self.fixed)])
            return [placed] if self.fits(placed) else []
        if len(self.homes) > len(self.layers):
            return []
        problem = self.problem()
        found = [self.placed(cuts, problem) for cuts in core.place(problem, slacks)]
        if not found and self.virtual > 1:
            # Stages that peak at different times may share a device though equal shares are too small.
            problem = self.problem([self.devices[home].budget_bytes for home in self.homes])
            found = [self.placed(cuts, problem) for cuts in core.place(problem, slacks)]
        return [placed for placed in found if self.fits(placed)]

    def placed(self, cuts: Sequence[int], problem: core.Problem | None = None) -> Placed:
        """The partition at these cuts, with the layers that are run again."""
        problem = self.problem() if problem is None else problem
        sums = core.sums_of(problem)
        again = []
        for stage, (first, last) in enumerate(zip(cuts, cuts[1:])):
            choice = core.weigh(problem, sums, core.order_of(problem, stage), stage, first, last)
            again.append(tuple(sorted(choice.again)))
        return Placed(tuple(range(a, b) for a, b in zip(cuts, cuts[1:])), tuple(again))

    def fits(self, placed: Placed) -> bool:
        """Whether every device's peak is within its budget."""
        return all(peak <= device.budget_bytes for peak, device in zip(self.peaks(placed), self.devices))

    def stage_bytes(self, placed: Placed) -> list[StageBytes]:
        """Bytes of every stage by category."""
        pairs = zip(placed.parts, placed.again, strict=True)
        return [self.memory.of(s, part.start, part.stop, again) for s, (part, again) in enumerate(pairs)]

    def peaks(self, placed: Placed) -> list[int]:
        """The most bytes of every device: over its stages what they hold, and the largest workspace of one."""
        parts = list(zip(placed.parts, placed.again, strict=True))
        each = [self.memory.each(s, part.start, part.stop, again) for s, (part, again) in enumerate(parts)]
        held = schedules.peak_on_ranks(self.actions, each)
        totals = self.stage_bytes(placed)
        return [
            int(held[rank])
            + sum(b.state_bytes + b.wire_bytes for b, home in zip(totals, self.homes) if home == rank)
            + max(b.workspace_bytes for b, home in zip(totals, self.homes) if home == rank)
            for rank in range(len(self.devices))
        ]

    def durations(self, placed: Placed) -> list[tuple[float, float, float]]:
        """(forward, input gradient, weight gradient) seconds of every stage."""
        result = []
        last = len(self.homes) - 1
        for s, (part, again) in enumerate(zip(placed.parts, placed.again, strict=True)):
            times = self.times[self.homes[s]]
            forward = math.fsum(times[k][0] for k in part)
            backward = math.fsum(times[k][1] for k in part) + math.fsum(times[k][0] for k in again)
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

    def transfers(self, placed: Placed) -> list[float]:
        """Seconds of one transfer over every boundary."""
        sizes = [self.layers[part.stop - 1].output_bytes for part in placed.parts[:-1]]
        result = []
        for size, boundary, rate in zip(sizes, self.boundaries, self.links, strict=True):
            result.append(wire_bytes(size, self.precision, boundary.codec) / rate if boundary.copied else 0.0)
        return result

    def updates(self, placed: Placed) -> list[float]:
        """Seconds of the update of every stage."""
        trained = [sum(self.layers[k].trained for k in part) for part in placed.parts]
        return [UPDATE_BYTES * n / self.speeds[home].update_rate for n, home in zip(trained, self.homes)]

    def step_s(self, placed: Placed) -> float:
        """Seconds of a step: every run of the schedule, and the slowest device's update."""
        updates = [0.0] * len(self.devices)
        for seconds, home in zip(self.updates(placed), self.homes):
            updates[home] += seconds
        timeline = schedules.simulate(self.actions, self.durations(placed), self.transfers(placed))
        return self.accumulate * timeline.makespan + max(updates)


_END_BYTES = ("enter_fixed", "enter_each", "enter_again", "leave_fixed", "leave_each", "leave_extra")
