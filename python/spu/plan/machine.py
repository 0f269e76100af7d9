"""The machine that is planned for: devices, their speeds and links, measured here or declared."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spu.common.units import split_pairs

if TYPE_CHECKING:
    from spu.devices.manager import Device

__all__ = ["Machine", "Speed", "make_machine", "read_speeds"]


# Published peaks: dense FLOP/s in 16 bits with fp32 accumulation and in fp32, bytes/s of memory. GeForce cards multiply
# fp16 with fp32 accumulation at half their headline rate.
CLASSES = {
    "rtx2070": (29.9e12, 7.5e12, 448e9),
    "rtx3060": (25.6e12, 12.7e12, 360e9),
    "rtx3070": (40.6e12, 20.3e12, 448e9),
    "rtx3090": (71.2e12, 35.6e12, 936e9),
    "rtx4060": (30.2e12, 15.1e12, 272e9),
    "rtx4090": (165e12, 82.6e12, 1008e9),
    "t4": (65e12, 8.1e12, 320e9),
    "a100": (312e12, 19.5e12, 1555e9),
    "h100": (989e12, 67e12, 3350e9),
    "desktop-cpu": (0.8e12, 0.8e12, 60e9),
}
REACHED = 0.5
"""Share of a published peak that training is taken to reach."""

PCIE, HOST = 12e9, 10e9
"""Nominal bytes/s between a GPU and the host (pinned), and between two CPU devices."""

DUPLEX = 0.75
"""The share of a link's rate that each direction keeps while both are busy, where it is not measured: consumer PCIe
carries about 1.5 times of one direction then, not twice (OneTrainer#1644)."""

DISK = 2.5e9, 1.25e9
"""Nominal bytes/s (read, written) of an NVMe drive: a quarter of what DeepNVMe measured of four (PCIe 4)."""

_RATE = re.compile(r"(\d+(?:\.\d*)?)\s*([GT])FLOPS?(?:/S)?", re.IGNORECASE)


@dataclass(frozen=True)
class Speed:
    """The speed of a device.

    Attributes:
        flops: FLOP/s reached in the training's precision.
        bandwidth: bytes/s of memory.
        update_rate: bytes/s at which an update moves `memory.update_bytes` per parameter; infinite if not known.
        pack_rate: bytes of tensor per second through pack or unpack; infinite if not known.
    """

    flops: float
    bandwidth: float
    update_rate: float = math.inf
    pack_rate: float = math.inf


@dataclass(frozen=True)
class Machine:
    """Devices in order, with what is known of them.

    Attributes:
        devices: with their budgets.
        speeds: of each.
        links: bytes/s by (from, to) index; others are nominal.
        made_up: names of the devices whose speeds are nominal, with where these come from.
        disk: bytes/s (read, written) of the disk below the devices.
        duplex: the share of a GPU's link that each direction keeps while both are busy.
    """

    devices: tuple[Device, ...]
    speeds: tuple[Speed, ...]
    links: Mapping[tuple[int, int], float] = field(default_factory=dict)
    made_up: Mapping[str, str] = field(default_factory=dict)
    disk: tuple[float, float] = DISK
    duplex: float = DUPLEX

    @property
    def host_rate(self) -> float:
        """Bytes/s at which the host updates what a GPU trains: of the first CPU device, else nominal."""
        cpus = [speed for device, speed in zip(self.devices, self.speeds) if device.name.startswith("cpu")]
        if not cpus:
            return REACHED * CLASSES["desktop-cpu"][2]
        return cpus[0].update_rate if math.isfinite(cpus[0].update_rate) else cpus[0].bandwidth

    def link(self, a: int, b: int) -> float:
        """Return the bytes per second from one device to another."""
        known = self.links.get((a, b))
        return known if known is not None else PCIE if self._has_gpu(a, b) else HOST

    def copies(self, a: int, b: int) -> bool:
        """Tell whether a tensor must be copied to get from one device to the other."""
        return a != b and self._has_gpu(a, b)

    def basis(self, names: Iterable[str]) -> str:
        """Return what times of counted work on these devices rest on, as a plan says it."""
        return "nominal" if any(name in self.made_up for name in names) else "estimated"

    def kind(self, k: int) -> tuple:
        """Return what tells a device from another one, the name left out."""
        device, speed = self.devices[k], self.speeds[k]
        return (device.torch_device.type, device.budget_bytes, speed.flops, speed.bandwidth)

    def _has_gpu(self, a: int, b: int) -> bool:
        return any(not self.devices[k].name.startswith("cpu") for k in (a, b))


def nominal_speed(name: str, given: str | None, precision: str) -> tuple[float, float, str]:
    """Return (FLOP/s, bytes/s, where they come from) of a device that was not measured.

    Args:
        name: of the device.
        given: a class of `CLASSES`, or a rate such as "20TFLOPS"; None for a usual class.
        precision: of the training.

    Raises:
        ValueError: neither a class nor a rate; lists what there is.
    """
    usual = "desktop-cpu" if name.startswith("cpu") else "rtx3070"
    chosen = (given or usual).lower()
    half, single, bandwidth = CLASSES.get(chosen, CLASSES[usual])
    if given is None or chosen in CLASSES:
        peak = single if precision == "fp32" else half
        return REACHED * peak, REACHED * bandwidth, f"half of what a {chosen} publishes"
    match = _RATE.fullmatch(given.strip())
    if match is None or not float(match[1]):
        raise ValueError(f"speed {name}={given}: give a rate such as 20TFLOPS, or one of {', '.join(sorted(CLASSES))}")
    return float(match[1]) * {"G": 1e9, "T": 1e12}[match[2].upper()], bandwidth * REACHED, f"given, {given}"


def read_speeds(text: str | None) -> dict[str, str]:
    """Return ``"cuda:0=rtx4090,cpu=200GFLOPS"`` as a mapping.

    Raises:
        ValueError: an entry that is not DEVICE=SPEED.
    """
    given = text or ""
    return {name.lower(): value for name, value in split_pairs(given, "speed", "SPEED", "cuda:0=rtx3070")}


def make_machine(
    devices: Sequence[Device],
    measured: Mapping[str, tuple[float, float]],
    speeds: Mapping[str, str],
    precision: str,
    links: Mapping[tuple[int, int], float] | None = None,
) -> Machine:
    """Return a machine from what was measured, with nominal figures for the rest.

    Args:
        devices: in order.
        measured: device name -> (FLOP/s, bytes/s).
        speeds: device name or kind -> a class or a rate that replaces what was measured.
        precision: of the training.
        links: bytes/s by (from, to) index.
    """
    reached, made_up = [], {}
    for device in devices:
        given = speeds.get(device.name, speeds.get(device.name.split(":")[0]))
        if given is None and device.name in measured:
            rate, bandwidth = measured[device.name]
        else:
            rate, bandwidth, made_up[device.name] = nominal_speed(device.name, given, precision)
        reached.append(Speed(rate, bandwidth, update_rate=bandwidth, pack_rate=bandwidth / 4))
    return Machine(tuple(devices), tuple(reached), links or {}, made_up)
