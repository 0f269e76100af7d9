"""What a plan says of a training whose state is larger than its devices: which tier holds what, and what moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spu.plan.visits import RESOURCES, SHARED, Busy, Visit, simulate_visits
from spu.schedules import Span

__all__ = ["StreamingPlan", "TierBytes", "busiest"]


@dataclass(frozen=True)
class TierBytes:
    """What a tier holds at its peak, and what it may hold.

    Attributes:
        name: "host" or "disk", or the device's own name, such as ``cuda:0``.
        peak_bytes: the most that it holds.
        budget_bytes: what may be used of it.
    """

    name: str
    peak_bytes: int
    budget_bytes: int


_BELOW = ("host", "disk")


@dataclass(frozen=True)
class StreamingPlan:
    """How stages are moved between tiers, and what a step then takes. Several devices take the stages in turn.

    Attributes:
        residency: of each stage: "resident", "offloaded" (weights on the device, gradients and state below) or
            "streamed" (all of them below).
        store: the tier in which regions have their home, "host" or "disk". With "disk" below a GPU, what moves goes
            through slots in the host's memory.
        slots: weight slots on each device, which its stages use in turn.
        state_slots: slots for gradients and state where the update is computed; on a GPU also its gradient slots.
        activations: where inputs of stages wait for the backward: "keep" (on the device), or "exact", "fp16", "int8"
            or "int4" in the tier below it.
        parked_bytes: what waits below of one microbatch, for each input that does, by stage.
        ring_bytes: bytes of all slots on a device, the largest of them.
        tiers: of the devices, the host and the disk, in this order; those that hold nothing are left out.
        link_in_bytes: what comes to the devices in a step.
        link_out_bytes: what leaves them.
        disk_read_bytes: what is read from the disk in a step.
        disk_written_bytes: what is written there.
        hidden_tokens: tokens of a step (rows, where tokens are not known) from which all moving is hidden behind
            compute, in the forward and in the backward; 0 if no number is enough.
        visits: the seconds of every visit of a stage, in the order of a step.
    """

    residency: tuple[str, ...]
    store: str
    slots: int
    state_slots: int
    activations: str
    parked_bytes: tuple[tuple[int, ...], ...]
    ring_bytes: int
    tiers: tuple[TierBytes, ...]
    link_in_bytes: int
    link_out_bytes: int
    disk_read_bytes: int
    disk_written_bytes: int
    hidden_tokens: int
    visits: tuple[Visit, ...]

    @property
    def devices(self) -> tuple[TierBytes, ...]:
        """The tiers that compute, in the order of ranks."""
        return tuple(tier for tier in self.tiers if tier.name not in _BELOW)

    @property
    def below(self) -> tuple[TierBytes, ...]:
        """The tiers below the devices."""
        return tuple(tier for tier in self.tiers if tier.name in _BELOW)

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of a step for which each resource is busy, of several devices' the busiest; compute on a CPU with
        the updates.
        """
        return busiest(self.visits, len(self.devices))

    @property
    def bottleneck(self) -> str:
        """The resource that is busy longest."""
        seconds = self.seconds
        return max(seconds, key=seconds.__getitem__)

    @property
    def limit_s(self) -> float:
        """Seconds of the best possible step: that of the bottleneck."""
        return max(self.seconds.values())

    def busy(self, microbatches: int) -> list[Busy]:
        """Return what every resource does, and when, in a predicted step of so many microbatches."""
        return simulate_visits(self.visits, self.slots, self.state_slots, len(self.devices), microbatches)

    def spans(self, seconds: Sequence[tuple[float, float]], microbatches: int) -> list[Span]:
        """Return the actions of a predicted step; where one waits for what moves, or for an update, there is a gap.

        Args:
            seconds: (forward, backward) of one microbatch on every stage.
            microbatches: of the step.
        """
        computes = [busy for busy in self.busy(microbatches) if busy.resource == RESOURCES[0]]
        if len(self.devices) > 1:
            return self._spans_of_several(computes, seconds)
        ends = {busy.visit: busy.end for busy in computes}
        result, last, when = list[Span](), len(seconds) - 1, 0.0
        for k, visit in enumerate(self.visits):
            stage, kinds = visit.stage, "F" if visit.forward else "B"
            if stage == last:  # it alternates, in what are two visits here
                if visit.forward:
                    continue
                kinds = "FB"
            own = [(kind, m) for m in range(microbatches) for kind in kinds]
            when = max(when, ends[k] - sum(seconds[stage]["FB".index(kind)] for kind, _ in own))
            for kind, microbatch in own:
                end = when + seconds[stage]["FB".index(kind)]
                result.append(Span(stage, kind, microbatch, when, end))
                when = end
        return result

    def _spans_of_several(self, computes: Sequence[Busy], seconds: Sequence[tuple[float, float]]) -> list[Span]:
        """Return the actions of several devices, each without what came before it in its visit."""
        result, ends = list[Span](), [0.0] * len(self.devices)
        for busy in sorted(computes, key=lambda each: each.end):
            visit = self.visits[busy.visit]
            rank, took = visit.stage % len(ends), seconds[visit.stage][0 if visit.forward else 1]
            start = max(busy.end - took, ends[rank])
            result.append(Span(visit.stage, "F" if visit.forward else "B", busy.microbatch, start, busy.end))
            ends[rank] = busy.end
        return result

    def check(self, stages: int) -> None:
        """Raise ValueError where entries do not fit together or to a plan of so many stages."""
        allowed = {
            "store": (self.store, ("host", "disk")),
            "state_slots": (self.state_slots, (1, 2)),
            "activations": (self.activations, ("keep", "exact", "fp16", "int8", "int4")),
            **{f"residency[{k}]": (r, ("resident", "offloaded", "streamed")) for k, r in enumerate(self.residency)},
        }
        for name, (value, values) in allowed.items():
            if value not in values:
                raise ValueError(f"streaming.{name} is {value!r}; there are {', '.join(map(repr, values))}")
        if len(self.residency) != stages:
            raise ValueError(f"streaming.residency must have one entry per stage, {stages}, got {len(self.residency)}")
        strange = next((visit.stage for visit in self.visits if visit.stage >= stages), None)
        if strange is not None or len(self.visits) != 2 * stages:
            raise ValueError(f"streaming.visits must be two of each stage, got {len(self.visits)}; plan again")
        if self.slots < 2:
            raise ValueError(f"streaming.slots is {self.slots}: one is filled while another is used, give 2 or more")
        names = [tier.name for tier in self.tiers]
        if names[len(self.devices) :] not in (["host"], ["disk"], ["host", "disk"]) or not self.devices:
            raise ValueError(f"streaming.tiers must be the devices, then host, disk or both, got {names}")
        if len(self.parked_bytes) != stages:
            raise ValueError(f"streaming.parked_bytes must have one entry per stage, {stages}; plan again")


def busiest(visits: Sequence[Visit], ranks: int) -> dict[str, float]:
    """Return for each resource the seconds for which it is busy in these visits, on the device where that is most."""
    found = {}
    for name in RESOURCES:
        groups = [visits] if name in SHARED else [[v for v in visits if v.stage % ranks == r] for r in range(ranks)]
        found[name] = max(sum(visit.seconds[name] for visit in own) for own in groups)
    return found
