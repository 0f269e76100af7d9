"""What a plan says of a training whose state is larger than its device: which tier holds what, and what moves."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RESOURCES", "StreamingPlan", "TierBytes"]

RESOURCES = ("compute", "link in", "link out", "host update", "disk")
"""What a step can wait for, in the order of `StreamingPlan`'s seconds."""


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


@dataclass(frozen=True)
class StreamingPlan:
    """How the stages of one device are moved between tiers, and what a step then takes.

    Attributes:
        residency: of each stage: "resident", "offloaded" (weights on the device, gradients and state below) or
            "streamed" (all of them below).
        store: the tier in which regions have their home, "host" or "disk". With "disk" below a GPU, what moves goes
            through slots in the host's memory.
        slots: weight slots on the device; stage s uses slot s modulo their number.
        state_slots: slots for gradients and state where the update is computed; on a GPU also its gradient slots.
        activations: where inputs of stages wait for the backward: "keep" (on the device), or "exact", "fp16" or "int8"
            in the tier below it.
        ring_bytes: bytes of all slots on the device.
        tiers: of the device, the host and the disk, in this order; those that hold nothing are left out.
        link_in_bytes: what comes to the device in a step.
        link_out_bytes: what leaves it.
        disk_read_bytes: what is read from the disk in a step.
        disk_written_bytes: what is written there.
        compute_s: seconds of a step in which the device computes; on a CPU with the updates.
        link_in_s: seconds in which the link to the device is busy.
        link_out_s: the same of the link from it.
        host_update_s: seconds of the updates that the host computes beside the device.
        disk_s: seconds in which the disk reads or writes.
        bottleneck: the one of `RESOURCES` that is busy longest.
        hidden_tokens: tokens of a step (rows, where tokens are not known) from which all moving is hidden behind
            compute, in the forward and in the backward; 0 if no number is enough.
    """

    residency: tuple[str, ...]
    store: str
    slots: int
    state_slots: int
    activations: str
    ring_bytes: int
    tiers: tuple[TierBytes, ...]
    link_in_bytes: int
    link_out_bytes: int
    disk_read_bytes: int
    disk_written_bytes: int
    compute_s: float
    link_in_s: float
    link_out_s: float
    host_update_s: float
    disk_s: float
    bottleneck: str
    hidden_tokens: int

    @property
    def seconds(self) -> dict[str, float]:
        """The busy seconds of each of `RESOURCES` in a step."""
        values = (self.compute_s, self.link_in_s, self.link_out_s, self.host_update_s, self.disk_s)
        return dict(zip(RESOURCES, values, strict=True))

    @property
    def limit_s(self) -> float:
        """Seconds of the best possible step: that of the resource that is busy longest."""
        return max(self.seconds.values())

    def check(self, stages: int) -> None:
        """Raise ValueError where entries do not fit together or to a plan of so many stages."""
        allowed = {
            "store": (self.store, ("host", "disk")),
            "state_slots": (self.state_slots, (1, 2)),
            "activations": (self.activations, ("keep", "exact", "fp16", "int8")),
            "bottleneck": (self.bottleneck, RESOURCES),
            **{f"residency[{k}]": (r, ("resident", "offloaded", "streamed")) for k, r in enumerate(self.residency)},
        }
        for name, (value, values) in allowed.items():
            if value not in values:
                raise ValueError(f"streaming.{name} is {value!r}; there are {', '.join(map(repr, values))}")
        if len(self.residency) != stages:
            raise ValueError(f"streaming.residency must have one entry per stage, {stages}, got {len(self.residency)}")
        if self.slots < 2:
            raise ValueError(f"streaming.slots is {self.slots}: one is filled while another is used, give 2 or more")
        names = [tier.name for tier in self.tiers[1:]]
        if not self.tiers or names not in (["host"], ["disk"], ["host", "disk"]):
            raise ValueError(f"streaming.tiers must be the device, then host, disk or both, got {names}")
