"""A partition with everything decided: its bytes, its times, and the plan that says them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from spu import schedules
from spu.plan.in_flight import held_moments, skeleton_of
from spu.plan.memory import MicrobatchBytes, StageBytes, update_bytes, wire_bytes
from spu.plan.plan import Plan, Predicted, StagePlan
from spu.schedules.simulate import runner
from spu.settings import Settings

if TYPE_CHECKING:
    from spu.plan.request import Request

__all__ = ["Placement"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Placement:
    """A partition with everything decided.

    Attributes:
        request: what it serves.
        parts: layers of each stage.
        recomputed: layers of each stage that are recomputed in the backward.
    """

    request: Request
    parts: tuple[range, ...]
    recomputed: tuple[tuple[int, ...], ...]

    @property
    def settings(self) -> Settings:
        """The settings that it serves."""
        return self.request.settings

    @property
    def cuts(self) -> list[int]:
        """The first layer of every stage, and the number of layers."""
        return [0, *(part.stop for part in self.parts)]

    @property
    def fits(self) -> bool:
        """Whether every device's peak is within its budget."""
        return self.lacking_bytes == 0

    @cached_property
    def lacking_bytes(self) -> int:
        """What the devices together need beyond their budgets."""
        return sum(max(peak - budget, 0) for peak, budget in zip(self.bounds, self.request.budgets))

    @cached_property
    def stages(self) -> list[StageBytes]:
        """The bytes of every stage by category, all at their largest."""
        return self._of_stages(self.request.memory.of)

    @cached_property
    def microbatch(self) -> list[MicrobatchBytes]:
        """What one microbatch holds on every stage."""
        return self._of_stages(self.request.memory.held)

    @cached_property
    def microbatch_bounds(self) -> list[int]:
        """What one microbatch holds at most on every stage between two actions."""
        return self._of_stages(self.request.memory.bound)

    def _of_stages(self, account: Callable[[int, int, int, Collection[int]], T]) -> list[T]:
        runs = enumerate(zip(self.parts, self.recomputed, strict=True))
        return [account(s, part.start, part.stop, recomputed) for s, (part, recomputed) in runs]

    @cached_property
    def bounds(self) -> list[int]:
        """What budgets are held against: what each device's stages hold together, and the largest workspace of one."""
        return [self._always(r) + self.bound_in_flight(r) for r in range(len(self.request.order))]

    @cached_property
    def peaks(self) -> list[int]:
        """The most bytes of every device as its actions come and go: what is predicted, at most `bounds`."""
        return [self._always(r) + self.peak_in_flight(r) for r in range(len(self.request.order))]

    def bound_in_flight(self, rank: int) -> int:
        """Return at most the bytes of a rank's microbatches and its workspace at a time."""
        one = [MicrobatchBytes(size, size, size) for size in self.microbatch_bounds]
        return self._in_flight(rank, one) + max(self.stages[s].workspace_bytes for s in self.of_rank(rank))

    def peak_in_flight(self, rank: int) -> int:
        """Return the most bytes of a rank's microbatches at a time, the work on one of them included."""
        return self._in_flight(rank, self.microbatch)

    def _in_flight(self, rank: int, one: Sequence[MicrobatchBytes]) -> int:
        """Return the most bytes of a rank's microbatches at a time, where `one` says what each stage holds of one."""
        most = 0
        for stage, kind, held in held_moments(*self.request.schedule)[rank]:
            others = sum(full * one[s].each + left * one[s].left for s, full, left in held)
            most = max(most, others + (one[stage].left if kind == "W" else one[stage].most))
        return most

    def of_rank(self, rank: int) -> list[int]:
        """Return the stages of a rank."""
        return [s for s, own in enumerate(self.request.ranks) if own == rank]

    def _always(self, rank: int) -> int:
        """Return the bytes that a rank holds all the time."""
        return sum(self.stages[s].state_bytes + self.stages[s].wire_bytes for s in self.of_rank(rank))

    @cached_property
    def durations(self) -> list[tuple[float, float, float]]:
        """(forward, input gradient, weight gradient) seconds of every stage."""
        request, result = self.request, []
        last = len(self.parts) - 1
        for s, (part, recomputed) in enumerate(zip(self.parts, self.recomputed, strict=True)):
            times, rate = request.times[request.ranks[s]], request.speeds[request.ranks[s]].pack_rate
            forward = math.fsum(times[k][0] for k in part)
            backward = math.fsum(times[k][1] for k in part) + math.fsum(times[k][0] for k in recomputed)
            weight = math.fsum(times[k][1] * request.layers[k].weight_share for k in part)
            packing = 0.0
            for cut, boundary in ((part.start, s - 1), (part.stop, s)):
                if 0 <= boundary < last:
                    packing += request.boundaries[boundary].packing_s(request.layers[cut].input_bytes, rate) / 2
            if s == last:
                forward, backward = forward + times[-1][0], backward + times[-1][1]
            result.append((forward + packing, backward + packing - weight, weight))
        return result

    @cached_property
    def crossing(self) -> list[int]:
        """Bytes on the wire of one transfer over every boundary; 0 where nothing is copied."""
        request = self.request
        sizes = [request.layers[part.stop - 1].output_bytes for part in self.parts[:-1]]
        precision = request.settings.precision
        return [wire_bytes(n, precision, b.codec) if b.copied else 0 for n, b in zip(sizes, request.boundaries)]

    @cached_property
    def transfers(self) -> list[float]:
        """Seconds of one transfer over every boundary."""
        return [size / rate if size else 0.0 for size, rate in zip(self.crossing, self.request.links, strict=True)]

    @cached_property
    def updates(self) -> list[float]:
        """Seconds of the update of every stage."""
        request = self.request
        trained = [sum(request.layers[k].trained_count for k in part) for part in self.parts]
        each = update_bytes(request.settings.state)
        return [each * n / request.speeds[rank].update_rate for n, rank in zip(trained, request.ranks)]

    @property
    def update_s(self) -> float:
        """Seconds of the slowest device's update."""
        return max(sum(self.updates[s] for s in self.of_rank(rank)) for rank in range(len(self.request.order)))

    @cached_property
    def step_s(self) -> float:
        """Seconds of a step: every run of the schedule, and the update."""
        skeleton = skeleton_of(*self.request.schedule)
        seconds = [(f, i + w, i, w) for f, i, w in self.durations]
        own = [seconds[stage][kind] for stage, kind in zip(skeleton.stages, skeleton.kinds)]
        _, ends = runner("auto")(*skeleton._replace(seconds=own, transfers=self.transfers))
        return self.request.settings.accumulate * max(ends) + self.update_s

    def plan(self, *, model: str, rows: int = 0, tokens: int = 0) -> Plan:
        """Return the plan of this placement, with everything predicted.

        Args:
            model: its name.
            rows, tokens: of a microbatch, noted in the plan.
        """
        request = self.request
        timeline = schedules.simulate(request.actions, self.durations, self.transfers)
        return Plan(
            model=model,
            settings=Settings.part_of(request.settings),
            rows=rows,
            tokens=tokens,
            codecs=request.codecs,
            stages=tuple(map(self._stage_plan, range(len(self.parts)))),
            predicted=Predicted(
                step_s=request.settings.accumulate * timeline.makespan + self.update_s,
                update_s=self.update_s,
                idle_share=timeline.idle_share,
                transfer_s=tuple(self.transfers),
                link_bytes=tuple(2 * request.settings.parts * size for size in self.crossing),
                peak_bytes=tuple(self.peaks),
                basis=request.basis,
            ),
            uncounted=tuple((c.name, c.basis) for c in (*request.layers, request.loss) if c.basis != "counted"),
        )

    def _stage_plan(self, s: int) -> StagePlan:
        device, one = self.request.devices[self.request.ranks[s]], self.microbatch[s]
        alone = [MicrobatchBytes(0, 0, 0)] * len(self.parts)
        alone[s] = replace(one, most=one.each)  # between actions
        saved = self._in_flight(self.request.ranks[s], alone)
        total = replace(self.stages[s], saved_bytes=saved, workspace_bytes=one.most - one.each)
        forward_s, input_s, weight_s = self.durations[s]
        return StagePlan(
            **vars(total),
            device=device.name,
            layers=(self.parts[s].start, self.parts[s].stop),
            layer_names=tuple(self.request.layers[k].name for k in self.parts[s]),
            recompute=self.recomputed[s],
            budget_bytes=device.budget_bytes,
            each_bytes=one.each,
            left_bytes=one.left,
            forward_s=forward_s,
            backward_s=input_s + weight_s,
            weight_s=weight_s,
            update_s=self.updates[s],
        )
