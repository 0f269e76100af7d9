"""One way to stream a model through its devices, with everything decided: its bytes on every tier, seconds and plan."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from spu.common.codecs import parked_bytes
from spu.plan.memory import ITEM_BYTES, update_bytes
from spu.plan.placement import Placement
from spu.plan.plan import Plan, StagePlan
from spu.plan.regions import Regions, aligned
from spu.plan.streaming import StreamingPlan, TierBytes, busiest
from spu.plan.visits import RESOURCES, Visit, simulate_visits
from spu.settings import Settings

if TYPE_CHECKING:
    from spu.devices.tiers import Tiers

__all__ = ["Streamed"]

CHECKED = 8 << 20
"""Bytes that a disk store checks or pads at a time, in memory of its own (`spu.memory.disk_store`)."""

PARKED = 3
"""Slots through which activations go to the tier below and come back (`spu.memory.activations`)."""


@dataclass(frozen=True, eq=False)
class Streamed:
    """One way to stream a model through its devices, with everything decided.

    Attributes:
        placed: the stages; the devices are all GPUs or all CPUs.
        tiers: what there is below the devices.
        residency: "offloaded" or "streamed", of all stages.
        store, slots, state_slots, activations: as in `StreamingPlan`.
    """

    placed: Placement
    tiers: Tiers
    residency: str
    store: str
    slots: int
    state_slots: int
    activations: str

    @cached_property
    def regions(self) -> list[Regions]:
        """The regions of every stage."""
        tied = map(self._tied, self.placed.parts)
        return [Regions.of(stage, self.settings, own) for stage, own in zip(self.placed.stages, tied, strict=True)]

    def _tied(self, part: range) -> tuple[int, int]:
        """Return the parameters, and the trained ones, that a stage has in common with an earlier one."""
        apart = [(p, t) for k in part for before, p, t in self.placed.request.layers[k].ties if before < part.start]
        return sum(p for p, _ in apart), sum(t for _, t in apart)

    @property
    def settings(self) -> Settings:
        """The settings that it serves."""
        return self.placed.request.settings

    @property
    def on_gpu(self) -> bool:
        """Whether the devices are GPUs: then the host updates."""
        return not self.placed.request.devices[0].name.startswith("cpu")

    @property
    def microbatches(self) -> int:
        return self.settings.run_microbatches

    @property
    def _streams(self) -> bool:
        return self.residency == "streamed"

    @property
    def ranks(self) -> int:
        """The number of devices, which take the stages in turn."""
        return len(self.placed.request.order)

    def _own(self, rank: int) -> list[Regions]:
        return self.regions[rank :: self.ranks]

    # Bytes

    def ring_bytes(self, rank: int) -> int:
        """Return the bytes of all slots on a device; of what is offloaded the weights are no slots."""
        weights = self._slot_bytes(rank) if self._streams else 0
        below = max(r.sums if self.on_gpu else max(r.sums, r.grads + r.state) for r in self._own(rank))
        return weights + self.state_slots * below

    def _slot_bytes(self, rank: int) -> int:
        """Return the bytes of all weight slots: each as large as the largest of the stages that use it."""
        own = self._own(rank)
        return sum(max((r.weights for r in own[k :: self.slots]), default=0) for k in range(self.slots))

    @cached_property
    def _boundaries(self) -> list[int]:
        """Bytes of one microbatch's input of every stage but the first."""
        return [self.placed.request.layers[part.start].input_bytes for part in self.placed.parts[1:]]

    @cached_property
    def _parked(self) -> list[list[tuple[int, int]]]:
        """Bytes (on the device, below) of one microbatch's inputs that wait below, of every stage's recomputed layers.

        The input of the first layer is the user's own batch, which stays; the last stage's backward comes at once.
        """
        if self.activations == "keep":
            return [[] for _ in self.regions]
        item = ITEM_BYTES[self.settings.precision]
        codec = None if self.activations == "exact" else self.activations
        inputs = [[self.placed.request.layers[k].input_bytes for k in own if k] for own in self.placed.recomputed]
        inputs[-1] = []
        return [[(size, aligned(parked_bytes(size // item, item, codec))) for size in own] for own in inputs]

    @cached_property
    def _below(self) -> list[int]:
        """Bytes that all microbatches of every stage leave below."""
        return [self.microbatches * sum(packed for _, packed in own) for own in self._parked]

    def _way_bytes(self, rank: int) -> int:
        """Return the bytes of the slots through which a CPU's activations go to the disk and come back."""
        return PARKED * max((packed for own in self._parked[rank :: self.ranks] for _, packed in own), default=0)

    @cached_property
    def peaks(self) -> list[int]:
        """The most that each device holds, as actions come and go."""
        return [self._device_bytes(rank, self.placed.peak_in_flight(rank)) for rank in range(self.ranks)]

    @cached_property
    def bounds(self) -> list[int]:
        """What each device's budget is held against."""
        return [self._device_bytes(rank, self.placed.bound_in_flight(rank)) for rank in range(self.ranks)]

    def _device_bytes(self, rank: int, in_flight: int) -> int:
        largest, own = max(self._boundaries, default=0), self._own(rank)
        # In the backward the gradients of all microbatches wait for the stage before; from another device, outputs too.
        waiting = (self.microbatches - (self.ranks == 1)) * largest
        if self.activations != "keep":
            in_flight -= self.microbatches * sum(map(self._gone, range(rank, len(self.regions), self.ranks)))
            # In the forward they wait for the next stage, and on a card until they are copied out; an input is there
            # when its layer runs again, and on a card the next one comes meanwhile.
            inputs = [size for stage in self._parked[rank :: self.ranks] for size, _ in stage]
            waiting += 2 * max([largest, *inputs]) + (0 if self.on_gpu else self._way_bytes(rank))
        resident = sum(r.tied_sums for r in own) + (0 if self._streams else sum(r.own_weights for r in own))
        largest_region = max(max(r.weights * self._streams, r.grads, r.state) for r in own)
        checked = 0 if self.on_gpu else min(CHECKED, largest_region)
        return self.ring_bytes(rank) + resident + in_flight + waiting + checked

    def _gone(self, stage: int) -> int:
        """Return the bytes of one microbatch in flight on a stage that wait below instead."""
        if stage == len(self.regions) - 1:  # it has one microbatch at a time
            return 0
        first = self.placed.parts[stage].start
        inner = sum(self.placed.request.layers[k].input_bytes for k in self.placed.recomputed[stage] if k > first)
        following = self.placed.parts[stage + 1].start in self.placed.recomputed[stage + 1]
        return (inner + self._boundaries[stage] * following) if self.activations != "keep" else 0

    @cached_property
    def tier_bytes(self) -> tuple[TierBytes, ...]:
        """What every tier holds, the devices first."""
        devices = self.placed.request.devices
        parked = sum(self._below)
        everything = sum(r.total if self._streams or self.on_gpu else r.grads + r.state for r in self.regions)
        host = disk = 0
        if not self.on_gpu:
            disk = everything + parked
        elif self.store == "host":
            host = everything + parked
        else:
            each = [self.state_slots * max(r.grads + r.state for r in self._own(k)) for k in range(self.ranks)]
            host = sum(map(self._slot_bytes, range(self.ranks))) + sum(each) + parked
            disk = everything
        found = [TierBytes(d.name, peak, d.budget_bytes) for d, peak in zip(devices, self.peaks, strict=True)]
        found += [TierBytes("host", host, self.tiers.host_bytes)] if host else []
        return (*found, *([TierBytes("disk", disk, self.tiers.disk_bytes)] if disk else []))

    @property
    def lacking(self) -> dict[str, int]:
        """Bytes that tiers are short of, by name."""
        short = {tier.name: self.needed[tier.name] - tier.budget_bytes for tier in self.tier_bytes}
        return {name: count for name, count in short.items() if count > 0}

    @property
    def needed(self) -> dict[str, int]:
        """Bytes that the budget of each tier is held against, by name."""
        peaks = {tier.name: tier.peak_bytes for tier in self.tier_bytes}
        return {**peaks, **dict(zip((device.name for device in self.placed.request.devices), self.bounds))}

    # Seconds

    @cached_property
    def moved(self) -> list[tuple[int, int, int, int]]:
        """Bytes (link in, link out, read, written) of every visit in a step: forwards, then backwards in reverse."""
        count, result = len(self.regions), []
        for k, r in enumerate(self.regions):  # with the last step's update
            host, trained = self.on_gpu and r.grads > 0, r.grads > 0
            # What the host has updated below comes, though the weights that do not change be in their slot.
            fetched = r.weights if self._fetched(k, True) else aligned(r.trained) if host else 0
            read = fetched + trained * (r.grads + r.state)
            written = trained * (r.state + (r.trained if self._streams or host else 0))
            result.append(self._moved(k, fetched, 0, read, written, left=self._below[k]))
        for k in reversed(range(count)):
            r = self.regions[k]
            fetched = r.weights if self._fetched(k, False) else 0
            result.append(self._moved(k, fetched, r.grads, fetched, r.grads, back=self._below[k], forward=False))
        return result

    def _fetched(self, stage: int, forward: bool) -> bool:
        """Whether all of a stage's weights come for a visit: those of the visits just before are in their slots."""
        turn, count = stage // self.ranks, len(self.regions) // self.ranks
        there = range(self.slots) if forward else range(count - self.slots, count)
        return self._streams and turn not in there

    def _moved(
        self,
        stage: int,
        into: int,
        out: int,
        read: int,
        written: int,
        *,
        left: int = 0,
        back: int = 0,
        forward: bool = True,
    ) -> tuple[int, int, int, int]:
        """Return the bytes of a visit as `moved` has them; ``left`` and ``back`` are activations that wait below."""
        if not self.on_gpu:
            return 0, 0, read + back, written + left
        before, after = ([0, *self.placed.crossing, 0][k] * self.microbatches for k in (stage, stage + 1))
        into, out = into + (before if forward else after), out + (after if forward else before)
        return into + back, out + left, *((read, written) if self.store == "disk" else (0, 0))

    @cached_property
    def visits(self) -> list[Visit]:
        """The visits of a step, with their seconds."""
        forward, backward = range(len(self.regions)), reversed(range(len(self.regions)))
        order = [*((k, True) for k in forward), *((k, False) for k in backward)]
        return [self._visit(*which, *moved) for which, moved in zip(order, self.moved, strict=True)]

    def _visit(self, k: int, forward: bool, link_in: int, link_out: int, read: int, written: int) -> Visit:
        request, rank = self.placed.request, k % self.ranks
        into, out_of = self._links[rank]
        both = request.machine.duplex if link_in and link_out else 1.0
        seconds = self.placed.durations[k]
        compute = seconds[0] if forward else seconds[1] + seconds[2]
        if self.activations not in ("keep", "exact"):
            compute += sum(size for size, _ in self._parked[k]) / request.speeds[rank].pack_rate
        update = self._updates[k] if forward else 0.0
        return Visit(
            stage=k,
            forward=forward,
            fetches=self._fetched(k, forward),
            updates=forward and self.regions[k].grads > 0,
            read_s=read / request.machine.disk[0],
            update_s=update if self.on_gpu else 0.0,
            in_s=link_in / (both * into),
            compute_s=self.microbatches * compute + (0.0 if self.on_gpu else update),
            first_s=0.0 if self.on_gpu else update,
            out_s=link_out / (both * out_of),
            written_s=written / request.machine.disk[1],
        )

    @cached_property
    def _updates(self) -> list[float]:
        """Seconds of the update of every stage, where it is computed."""
        request = self.placed.request
        host = [request.machine.host_rate] * self.ranks
        rates = host if self.on_gpu else [speed.update_rate for speed in request.speeds]
        each = update_bytes(request.settings.state)
        return [each * r.sums / 4 / rates[k % self.ranks] for k, r in enumerate(self.regions)]

    @cached_property
    def _host(self) -> int | None:
        """The machine's index of a CPU beside the GPU, if it is known."""
        devices = self.placed.request.machine.devices
        return next((k for k, device in enumerate(devices) if device.name.startswith("cpu")), None)

    @cached_property
    def _links(self) -> list[tuple[float, float]]:
        """Bytes per second to each device, and from it."""
        machine, host = self.placed.request.machine, self._host
        if host is None or not self.on_gpu:
            return [(machine.link(own, own), machine.link(own, own)) for own in self.placed.request.order]
        return [(machine.link(host, own), machine.link(own, host)) for own in self.placed.request.order]

    @cached_property
    def step_s(self) -> float:
        """Seconds of a step."""
        busy = simulate_visits(self.visits, self.slots, self.state_slots, self.ranks, self.microbatches)
        return max(each.end for each in busy)

    # The plan

    def plan(self, *, model: str = "", rows: int = 0, tokens: int = 0) -> Plan:
        """Return the plan of this case, with everything predicted; arguments as of `Placement.plan`."""
        made = self.placed.plan(model=model, rows=rows, tokens=tokens)
        settings = replace(made.settings, residency=self.residency, activations=self.activations)
        compute = sum(visit.compute_s for visit in self.visits) / self.ranks
        predicted = replace(
            made.predicted,
            step_s=self.step_s,
            update_s=0.0 if self.on_gpu else max(sum(self._updates[k :: self.ranks]) for k in range(self.ranks)),
            idle_share=max(0.0, 1.0 - compute / self.step_s) if self.step_s else 0.0,
            peak_bytes=tuple(self.peaks),
        )
        streaming = self._streaming(rows * (tokens or 1) * self.microbatches)
        stages = tuple(itertools.starmap(self._stage, enumerate(made.stages)))
        return replace(made, settings=settings, predicted=predicted, stages=stages, streaming=streaming)

    def _stage(self, index: int, stage: StagePlan) -> StagePlan:
        """Return a stage's plan without the activations that wait below."""
        gone = self._gone(index)
        saved = max(stage.saved_bytes - self.microbatches * gone, 0)
        return replace(stage, each_bytes=max(stage.each_bytes - gone, 0), saved_bytes=saved)

    def _streaming(self, tokens: int) -> StreamingPlan:
        link_in, link_out, read, written = (sum(sizes) for sizes in zip(*self.moved, strict=True))
        return StreamingPlan(
            residency=(self.residency,) * len(self.regions),
            store=self.store,
            slots=self.slots,
            state_slots=self.state_slots,
            activations=self.activations,
            parked_bytes=tuple(tuple(packed for _, packed in own) for own in self._parked),
            ring_bytes=max(map(self.ring_bytes, range(self.ranks))),
            tiers=self.tier_bytes,
            link_in_bytes=link_in,
            link_out_bytes=link_out,
            disk_read_bytes=read,
            disk_written_bytes=written,
            hidden_tokens=self.hidden_tokens(tokens),
            visits=tuple(self.visits),
        )

    def hidden_tokens(self, tokens: int) -> int:
        """Return the tokens of a step from which nothing waits for what moves, where this one has ``tokens``.

        Compute grows with the tokens, weights and states do not. Where a token takes c seconds of compute and m of
        moving, and what does not grow takes C (updates) and M, n tokens hide it if n c + C >= n m + M, for every
        resource, in the forward and in the backward.
        """
        count, fewest = len(self.regions), 0
        in_turn = [self.visits[rank : count : self.ranks] for rank in range(self.ranks)]
        still = replace(self, activations="keep")
        for phase in (slice(0, count), slice(count, None)):
            now, fixed = (busiest(case.visits[phase], self.ranks) for case in (self, still))
            update = 0.0 if phase.start else max(sum(v.first_s for v in own) for own in in_turn)
            per_token = (now[RESOURCES[0]] - update) / tokens
            for name in RESOURCES[1:]:
                more = (now[name] - fixed[name]) / tokens
                if fixed[name] > update and more >= per_token:
                    return 0
                if more < per_token:
                    fewest = max(fewest, math.ceil((fixed[name] - update) / (per_token - more)))
                elif more > per_token:
                    return 0
        return fewest
