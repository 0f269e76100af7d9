"""One way to stream a model through a device, with everything decided: its bytes on every tier, seconds and plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from spu.plan.memory import ITEM_BYTES, StageBytes, update_bytes, wire_bytes
from spu.plan.placement import Placement
from spu.plan.plan import Plan, StagePlan
from spu.plan.streaming import RESOURCES, StreamingPlan, TierBytes
from spu.plan.visits import Visit, simulate_visits
from spu.settings import Settings

if TYPE_CHECKING:
    from spu.devices.tiers import Tiers

__all__ = ["Streamed"]

DUPLEX = 0.75
"""The share of a link's rate that each direction keeps while both are busy: consumer PCIe carries about 1.5 times of
one direction then, not twice (OneTrainer#1644)."""

ALIGNMENT = 4096
"""Bytes to which regions and slots are rounded up, as `spu.memory.store` asks."""

PARKED = 4
"""Microbatches' activations on their way to the tier below or back, which are on the device meanwhile."""


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Regions:
    """Bytes of a stage's regions, aligned, and of the weights that are trained."""

    weights: int
    grads: int
    state: int
    trained: int

    @classmethod
    def of(cls, stage: StageBytes, item: int) -> Regions:
        grads, state = _aligned(stage.main_grad_bytes), _aligned(stage.master_bytes + stage.moment_bytes)
        return cls(_aligned(stage.param_bytes), grads, state, stage.main_grad_bytes // 4 * item)

    @property
    def total(self) -> int:
        return self.weights + self.grads + self.state


@dataclass(frozen=True, eq=False)
class Streamed:
    """One way to stream a model through a device, with everything decided.

    Attributes:
        placed: the stages.
        tiers: what there is below the device.
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
        item = ITEM_BYTES[self.settings.precision]
        return [Regions.of(stage, item) for stage in self.placed.stages]

    @property
    def settings(self) -> Settings:
        """The settings that it serves."""
        return self.placed.request.settings

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU: then the host updates."""
        return not self.placed.request.devices[0].name.startswith("cpu")

    @property
    def microbatches(self) -> int:
        return self.settings.run_microbatches

    @property
    def _streams(self) -> bool:
        return self.residency == "streamed"

    # Bytes

    @cached_property
    def ring_bytes(self) -> int:
        """All slots on the device; of what is offloaded the weights are no slots."""
        weights = self._slot_bytes if self._streams else 0
        below = max(r.grads if self.on_gpu else r.grads + r.state for r in self.regions)
        return weights + self.state_slots * below

    @property
    def _slot_bytes(self) -> int:
        """All weight slots: each as large as the largest of the stages that use it."""
        return sum(max((r.weights for r in self.regions[k :: self.slots]), default=0) for k in range(self.slots))

    @cached_property
    def _boundaries(self) -> list[int]:
        """Bytes of one microbatch's input of every stage but the first."""
        return [self.placed.request.layers[part.start].input_bytes for part in self.placed.parts[1:]]

    @cached_property
    def _packed(self) -> list[int]:
        """The same in the form in which they wait below; nothing if they are kept."""
        if self.activations == "keep":
            return [0 for _ in self._boundaries]
        codec, precision = self.activations.replace("exact", "none"), self.settings.precision
        return [wire_bytes(size, precision, codec) for size in self._boundaries]

    @property
    def peak_bytes(self) -> int:
        """The most that the device holds, as actions come and go."""
        return self._device_bytes(self.placed.peak_in_flight(0))

    @property
    def bound_bytes(self) -> int:
        """What the device's budget is held against."""
        return self._device_bytes(self.placed.bound_in_flight(0))

    def _device_bytes(self, in_flight: int) -> int:
        largest = max(self._boundaries, default=0)
        if self.activations != "keep":  # of inputs, those of one stage are there, and some on their way
            in_flight += (1 + PARKED) * largest - self.microbatches * (sum(self._boundaries) - largest)
        resident = 0 if self._streams else sum(r.weights for r in self.regions)
        # In the backward the gradients of all microbatches wait for the stage before.
        return self.ring_bytes + resident + in_flight + (self.microbatches - 1) * largest

    @cached_property
    def tier_bytes(self) -> tuple[TierBytes, ...]:
        """What every tier holds, the device first."""
        device = self.placed.request.devices[0]
        parked = self.microbatches * sum(self._packed)
        everything = sum(r.total if self._streams or self.on_gpu else r.grads + r.state for r in self.regions)
        host = disk = 0
        if not self.on_gpu:
            disk = everything + parked
        elif self.store == "host":
            host = everything + parked
        else:
            host = self._slot_bytes + self.state_slots * max(r.grads + r.state for r in self.regions) + parked
            disk = everything
        found = [TierBytes(device.name, self.peak_bytes, device.budget_bytes)]
        found += [TierBytes("host", host, self.tiers.host_bytes)] if host else []
        return (*found, *([TierBytes("disk", disk, self.tiers.disk_bytes)] if disk else []))

    @property
    def lacking(self) -> dict[str, int]:
        """Bytes that tiers are short of, by name."""
        below = {tier.name: tier.peak_bytes - tier.budget_bytes for tier in self.tier_bytes[1:]}
        own = {self.tier_bytes[0].name: self.bound_bytes - self.tier_bytes[0].budget_bytes}
        return {name: short for name, short in {**own, **below}.items() if short > 0}

    # Seconds

    @cached_property
    def moved(self) -> list[tuple[int, int, int, int]]:
        """Bytes (link in, link out, read, written) of every visit in a step: forwards, then backwards in reverse."""
        count, result = len(self.regions), []
        parked = [self.microbatches * size for size in (*self._packed, 0)]
        for k, r in enumerate(self.regions):  # with the last step's update
            host, trained = self.on_gpu and r.grads > 0, r.grads > 0  # the host updates the weights below
            fetched = r.weights if self._fetched(k, True) else 0 if self._streams else r.trained
            read = (r.weights if host else fetched if self._streams else 0) + trained * (r.grads + r.state)
            written = trained * (r.state + (r.trained if self._streams or host else 0))
            result.append(self._moved(fetched, 0, read, written, left=parked[k]))
        for k in reversed(range(count)):
            r = self.regions[k]
            fetched = r.weights if self._fetched(k, False) else 0
            result.append(self._moved(fetched, r.grads, fetched, r.grads, back=parked[k - 1] if k else 0))
        return result

    def _fetched(self, stage: int, forward: bool) -> bool:
        """Whether a stage's weights come for a visit: those of the visits just before are still in their slots."""
        if forward and self.on_gpu and self.regions[stage].grads:
            return self._streams  # the host has updated them since
        there = range(self.slots) if forward else range(len(self.regions) - self.slots, len(self.regions))
        return self._streams and stage not in there

    def _moved(
        self, into: int, out: int, read: int, written: int, *, left: int = 0, back: int = 0
    ) -> tuple[int, int, int, int]:
        """Return the bytes of a visit as `moved` has them; ``left`` and ``back`` are activations that wait below."""
        if not self.on_gpu:
            return 0, 0, read + back, written + left
        return into + back, out + left, *((read, written) if self.store == "disk" else (0, 0))

    @cached_property
    def visits(self) -> list[Visit]:
        """The visits of a step, with their seconds."""
        forward, backward = range(len(self.regions)), reversed(range(len(self.regions)))
        order = [*((k, True) for k in forward), *((k, False) for k in backward)]
        return [self._visit(*which, *moved) for which, moved in zip(order, self.moved, strict=True)]

    def _visit(self, k: int, forward: bool, link_in: int, link_out: int, read: int, written: int) -> Visit:
        request = self.placed.request
        into, out_of = self._links
        both = DUPLEX if link_in and link_out else 1.0
        seconds = self.placed.durations[k]
        compute = seconds[0] if forward else seconds[1] + seconds[2]
        compute += sum(self._packing_s[k : k + 1] if forward else self._packing_s[max(k - 1, 0) : k])
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
            out_s=link_out / (both * out_of),
            written_s=written / request.machine.disk[1],
        )

    @cached_property
    def _packing_s(self) -> list[float]:
        """Seconds in which the device packs, or unpacks, one microbatch's input of every stage but the first."""
        rate, sizes = self.placed.request.speeds[0].pack_rate, zip(self._boundaries, self._packed)
        return [size / rate if packed not in (0, size) else 0.0 for size, packed in sizes]

    @cached_property
    def _updates(self) -> list[float]:
        """Seconds of the update of every stage, where it is computed."""
        request = self.placed.request
        rate = request.machine.host_rate if self.on_gpu else request.speeds[0].update_rate
        return [update_bytes(request.settings.state) * r.grads / 4 / rate for r in self.regions]

    @cached_property
    def _host(self) -> int | None:
        """The machine's index of a CPU beside the GPU, if it is known."""
        devices = self.placed.request.machine.devices
        return next((k for k, device in enumerate(devices) if device.name.startswith("cpu")), None)

    @property
    def _links(self) -> tuple[float, float]:
        """Bytes per second to the device, and from it."""
        machine, own = self.placed.request.machine, self.placed.request.order[0]
        if self._host is None or not self.on_gpu:
            return machine.link(own, own), machine.link(own, own)
        return machine.link(self._host, own), machine.link(own, self._host)

    @cached_property
    def spans(self) -> list[tuple[float, float]]:
        """When the compute of each visit runs, and last when the step ends."""
        return simulate_visits(self.visits, self.slots, self.state_slots)

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.spans[-1][1]

    # The plan

    def plan(self, *, model: str = "", rows: int = 0, tokens: int = 0) -> Plan:
        """Return the plan of this case, with everything predicted; arguments as of `Placement.plan`."""
        made = self.placed.plan(model=model, rows=rows, tokens=tokens)
        settings = replace(made.settings, residency=self.residency, activations=self.activations)
        compute = sum(visit.compute_s for visit in self.visits)
        predicted = replace(
            made.predicted,
            step_s=self.step_s,
            update_s=0.0 if self.on_gpu else sum(self._updates),
            idle_share=max(0.0, 1.0 - compute / self.step_s) if self.step_s else 0.0,
            peak_bytes=(self.peak_bytes,),
        )
        stages = made.stages if self.activations == "keep" else tuple(map(self._parked, made.stages, self._left))
        streaming = self._streaming(rows * (tokens or 1) * self.microbatches)
        return replace(made, settings=settings, predicted=predicted, stages=stages, streaming=streaming)

    @property
    def _left(self) -> list[int]:
        """Bytes of one microbatch's output of every stage that waits below."""
        return [0 if self.activations == "keep" else size for size in (*self._boundaries, 0)]

    def _parked(self, stage: StagePlan, output: int) -> StagePlan:
        each = max(stage.each_bytes - output, 0)
        return replace(stage, each_bytes=each, saved_bytes=self.microbatches * each)

    def _streaming(self, tokens: int) -> StreamingPlan:
        moved = [sum(sizes) for sizes in zip(*self.moved, strict=True)]
        visits = self.visits
        result = StreamingPlan(
            residency=(self.residency,) * len(self.regions),
            store=self.store,
            slots=self.slots,
            state_slots=self.state_slots,
            activations=self.activations,
            ring_bytes=self.ring_bytes,
            tiers=self.tier_bytes,
            link_in_bytes=moved[0],
            link_out_bytes=moved[1],
            disk_read_bytes=moved[2],
            disk_written_bytes=moved[3],
            compute_s=sum(v.compute_s for v in visits),
            link_in_s=sum(v.in_s for v in visits),
            link_out_s=sum(v.out_s for v in visits),
            host_update_s=sum(v.update_s for v in visits),
            disk_s=sum(v.read_s + v.written_s for v in visits),
            bottleneck=RESOURCES[0],
            hidden_tokens=self.hidden_tokens(tokens),
        )
        seconds = result.seconds
        return replace(result, bottleneck=max(seconds, key=seconds.__getitem__))

    def hidden_tokens(self, tokens: int) -> int:
        """Return the tokens of a step from which nothing waits for what moves, where this one has ``tokens``.

        Compute grows with the tokens, weights and states do not. Where a token takes c seconds of compute and m of
        moving, and what does not grow takes C (updates) and M, n tokens hide it if n c + C >= n m + M, for every
        resource, in the forward and in the backward.
        """
        count, fewest = len(self.regions), 0
        still = replace(self, activations="keep")
        for phase in (slice(0, count), slice(count, None)):
            fixed = _busy(still.visits[phase])
            update = 0.0 if self.on_gpu or phase.start else sum(self._updates)
            growing = [(a - b) / tokens for a, b in zip(_busy(self.visits[phase]), fixed)]
            per_token = (_busy(self.visits[phase])[0] - update) / tokens
            for moving, more in zip(fixed[1:], growing[1:]):
                if moving <= update and more <= per_token:
                    continue
                if more >= per_token:
                    return 0
                fewest = max(fewest, math.ceil((moving - update) / (per_token - more)))
        return fewest


def _busy(visits: Sequence[Visit]) -> list[float]:
    """Return the seconds of each of `RESOURCES` in these visits."""
    rows = [(v.compute_s, v.in_s, v.out_s, v.update_s, v.read_s + v.written_s) for v in visits]
    return [sum(seconds) for seconds in zip(*rows, strict=True)]
