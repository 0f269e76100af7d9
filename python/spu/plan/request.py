"""Everything that decides a plan, and the partitions that serve it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np

from spu import schedules
from spu.plan.in_flight import actions_of
from spu.plan.layer_cost import LayerCost
from spu.plan.machine import Machine, Speed
from spu.plan.memory import Boundary, StageMemory, wire_bytes
from spu.plan.partition import best_cuts, minimise
from spu.plan.placement import Placement
from spu.plan.stage_table import LayerArrays, StageTable
from spu.schedules import Action
from spu.settings import Settings

if TYPE_CHECKING:
    from spu.devices.manager import Device

__all__ = ["Request", "Times", "crossings"]

Times = tuple[tuple[float, float], ...]
"""(forward, backward) seconds of every layer, and last of the loss, for one microbatch on one device."""


def crossings(settings: Settings, order: Sequence[int]) -> list[tuple[int, int]]:
    """Return the devices on both sides of every stage boundary, where the ranks are the devices of `order`."""
    ranks = schedules.stage_ranks(settings.schedule, len(order), settings.stages_per_rank)
    return [(order[a], order[b]) for a, b in pairwise(ranks)]


def fastest_codec(machine: Machine, precision: str, a: int, b: int, tensor_bytes: int, *, worth: float = 1.0) -> str:
    """Return "int8" where it takes a tensor over a link in less than this share of the time, else "none"; packing and
    unpacking included.
    """

    def seconds(codec: str) -> float:
        packing = 0.0
        if codec != "none":
            packing = tensor_bytes / machine.speeds[a].pack_rate + tensor_bytes / machine.speeds[b].pack_rate
        return wire_bytes(tensor_bytes, precision, codec) / machine.link(a, b) + packing

    return "int8" if seconds("int8") < worth * seconds("none") else "none"


@dataclass(frozen=True)
class Request:
    """Everything that decides a plan.

    Attributes:
        machine: devices, speeds and links.
        order: the machine's device of each rank.
        layers, loss: what they cost.
        measured: seconds of the layers and the loss on each device of the machine; None: counted work at its speeds.
        settings: of the training, with a schedule and a number of microbatches.
        codecs: one per boundary.
        fixed: the layers of each stage, if they are given.
    """

    machine: Machine
    order: tuple[int, ...]
    layers: tuple[LayerCost, ...]
    loss: LayerCost
    measured: Sequence[Sequence[tuple[float, float]]] | None
    settings: Settings
    codecs: tuple[str, ...]
    fixed: tuple[range, ...] | None = None

    def changed(self, **settings: Any) -> Request:
        """Return the same request with other settings."""
        return replace(self, settings=replace(self.settings, **settings))

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """The device of each rank."""
        return tuple(self.machine.devices[k] for k in self.order)

    @cached_property
    def speeds(self) -> tuple[Speed, ...]:
        """The speeds of each rank."""
        return tuple(self.machine.speeds[k] for k in self.order)

    @cached_property
    def times(self) -> tuple[Times, ...]:
        """Seconds of the layers and the loss on each rank."""
        if self.measured is not None:
            return tuple(tuple(self.measured[k]) for k in self.order)
        return tuple(
            tuple(cost.seconds(s.flops, s.bandwidth) for cost in (*self.layers, self.loss)) for s in self.speeds
        )

    @cached_property
    def links(self) -> list[float]:
        """Bytes per second over each boundary."""
        return [self.machine.link(a, b) for a, b in crossings(self.settings, self.order)]

    @property
    def basis(self) -> str:
        """What the plan's times rest on."""
        return "measured" if self.measured is not None else self.machine.basis(d.name for d in self.devices)

    @cached_property
    def ranks(self) -> list[int]:
        """The rank of each stage."""
        return schedules.stage_ranks(self.settings.schedule, len(self.order), self.settings.virtual)

    @property
    def schedule(self) -> tuple[str, int, int, int]:
        """The schedule's name, ranks, microbatches of a run, and stages on each rank."""
        s = self.settings
        return s.schedule, len(self.order), s.run_microbatches, s.stages_per_rank

    @cached_property
    def actions(self) -> list[list[Action]]:
        """One run of the schedule."""
        return actions_of(*self.schedule)

    @cached_property
    def boundaries(self) -> list[Boundary]:
        """How each stage boundary is crossed."""
        on_gpu = [not self.devices[rank].name.startswith("cpu") for rank in self.ranks]
        result = []
        for k, codec in enumerate(self.codecs):
            same = self.ranks[k] == self.ranks[k + 1]
            shared = same or not (on_gpu[k] or on_gpu[k + 1])
            result.append(Boundary(codec, codec != "none" or not shared, on_gpu[k], on_gpu[k + 1]))
        return result

    @cached_property
    def memory(self) -> StageMemory:
        """The bytes of any stage."""
        return StageMemory(
            self.layers,
            self.loss,
            in_flight=schedules.peak_in_flight(self.actions),
            boundaries=self.boundaries,
            precision=self.settings.precision,
            deferred=schedules.splits_backward(self.settings.schedule),
            state=self.settings.state,
        )

    @cached_property
    def budgets(self) -> list[int]:
        """The budget of each rank."""
        return [device.budget_bytes for device in self.devices]

    @cached_property
    def arrays(self) -> LayerArrays:
        """The layers' costs as arrays."""
        return LayerArrays(self)

    @cached_property
    def tables(self) -> list[StageTable]:
        """Every run of layers on each stage, which may use an equal share of its device's budget."""
        return self._tables(self.settings.stages_per_rank)

    def _tables(self, shares: int) -> list[StageTable]:
        return [StageTable(self, stage, self.budgets[rank] // shares) for stage, rank in enumerate(self.ranks)]

    def candidates(self, slacks: Sequence[float] = ()) -> list[Placement]:
        """Return partitions within the budgets, the one with the fastest slowest stage first; none if nothing fits."""
        if self.fixed is not None:
            placed = self.closest()
            return [placed] if placed.fits else []
        if len(self.ranks) > len(self.layers):
            return []
        alternatives = [self.tables]
        if self.settings.stages_per_rank > 1:
            # Stages that peak at different times may share a device though equal shares of its budget are too small.
            alternatives.append(self._tables(1))
        for tables in alternatives:
            found = [self.placed(cuts, tables) for cuts in best_cuts([t.fitting() for t in tables], slacks)]
            fitting = [placed for placed in found if placed.fits]
            if not fitting:
                # A table knows a share of its device's budget; only here do a device's stages share all of it.
                starts = [self.closest(tables), *found]
                rounds = len(self.layers) if self.settings.stages_per_rank > 1 else 0
                near = [self.improved(start, lambda p: p.lacking_bytes, rounds, tables) for start in starts]
                fitting = [placed for placed in near if placed.fits]
            if fitting:
                return fitting
        return []

    def closest(self, tables: Sequence[StageTable] | None = None) -> Placement:
        """Return the partition where the stage that is shortest of memory lacks least, or the given one."""
        if self.fixed is not None:
            return self.placed([0, *(part.stop for part in self.fixed)])
        tables = self.tables if tables is None else tables
        return self.placed(minimise([table.lacking() for table in tables], np.maximum)[1], tables)

    def improved(
        self,
        placed: Placement,
        value: Callable[[Placement], float],
        rounds: int,
        tables: Sequence[StageTable] | None = None,
    ) -> Placement:
        """Move boundaries one layer at a time, in at most so many rounds, as long as that makes `value` smaller."""
        for _ in range(rounds):
            cuts = placed.cuts
            moves = [
                self.placed([*cuts[:k], cuts[k] + step, *cuts[k + 1 :]], tables)
                for k, step in product(range(1, len(cuts) - 1), (-1, 1))
                if cuts[k - 1] < cuts[k] + step < cuts[k + 1]
            ]
            best = min(moves, key=value, default=placed)
            if value(best) >= value(placed):
                break
            placed = best
        return placed

    def placed(self, cuts: Sequence[int], tables: Sequence[StageTable] | None = None) -> Placement:
        """Return the partition at these cuts, with the layers that are recomputed."""
        parts = tuple(range(first, stop) for first, stop in pairwise(cuts))
        given = self.settings.recompute
        if given.mode == "given":
            return Placement(self, parts, tuple(tuple(k for k in part if k in given.layers) for part in parts))
        tables = self.tables if tables is None else tables
        recomputed = (table.recomputed(part.start, part.stop) for table, part in zip(tables, parts, strict=True))
        return Placement(self, parts, tuple(recomputed))
