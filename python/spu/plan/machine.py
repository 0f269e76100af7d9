"""The machine that is planned for: devices, their speeds and links; measured here, or declared for one that is not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spu.devices.manager import Device

__all__ = [
    "CLASSES",
    "REACHED",
    "Card",
    "Machine",
    "Speed",
    "given_speed",
    "make_machine",
    "nominal_speed",
    "read_speeds",
]


@dataclass(frozen=True)
class Card:
    """What makers publish of a device class: dense FLOP/s with fp32 accumulation, and bytes/s of its memory."""

    half: float
    single: float
    bandwidth: float


# Published peaks. GeForce cards multiply fp16 with fp32 accumulation at half their headline rate.
CLASSES = {
    "rtx2070": Card(29.9e12, 7.5e12, 448e9),
    "rtx3060": Card(25.6e12, 12.7e12, 360e9),
    "rtx3070": Card(40.6e12, 20.3e12, 448e9),
    "rtx3090": Card(71.2e12, 35.6e12, 936e9),
    "rtx4060": Card(30.2e12, 15.1e12, 272e9),
    "rtx4090": Card(165e12, 82.6e12, 1008e9),
    "t4": Card(65e12, 8.1e12, 320e9),
    "a100": Card(312e12, 19.5e12, 1555e9),
    "h100": Card(989e12, 67e12, 3350e9),
    "desktop-cpu": Card(0.8e12, 0.8e12, 60e9),
}
DEFAULT_CARD, DEFAULT_CPU = "rtx3070", "desktop-cpu"
REACHED = 0.5
"""Share of a published peak that training is taken to reach."""

PCIE, HOST = 12e9, 10e9
"""Nominal bytes/s between a GPU and the host (pinned), and between two CPU devices."""

_RATE = re.compile(r"(\d+(?:\.\d*)?)\s*([GT])FLOPS?(?:/S)?", re.IGNORECASE)


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
class Machine:
    """Devices in order, with what is known of them.

    Attributes:
        devices: with their budgets.
        flops: FLOP/s reached in the training's precision.
        bandwidths: bytes/s of memory.
        speeds: of update and packing.
        links: bytes/s by (from, to) index; others are nominal.
        made_up: names of the devices whose speeds are nominal, with where these come from.
    """

    devices: tuple[Device, ...]
    flops: tuple[float, ...]
    bandwidths: tuple[float, ...]
    speeds: tuple[Speed, ...]
    links: Mapping[tuple[int, int], float] = field(default_factory=dict)
    made_up: Mapping[str, str] = field(default_factory=dict)

    def link(self, a: int, b: int) -> float:
        """Bytes per second from one device to another."""
        known = self.links.get((a, b))
        return known if known is not None else PCIE if self._has_card(a, b) else HOST

    def copies(self, a: int, b: int) -> bool:
        """Whether a tensor must be copied to get from one to the other."""
        return a != b and self._has_card(a, b)

    def basis(self, names: Iterable[str]) -> str:
        """Return what times of counted work on these devices rest on, as a plan says it."""
        return "nominal" if any(name in self.made_up for name in names) else "estimated"

    def kind(self, k: int) -> tuple:
        """What tells a device from another one, but for its name."""
        device = self.devices[k]
        return (device.torch_device.type, device.budget_bytes, self.flops[k], self.bandwidths[k])

    def _has_card(self, a: int, b: int) -> bool:
        return any(not self.devices[k].name.startswith("cpu") for k in (a, b))


def nominal_speed(name: str, given: str | None, precision: str) -> tuple[float, float, str]:
    """(FLOP/s, bytes/s, where they come from) of a device that was not measured.

    Args:
        name: of the device.
        given: a class of `CLASSES`, or a rate such as "20TFLOPS"; None for a usual one.
        precision: of the training.

    Raises:
        ValueError: neither a class nor a rate; lists what there is.
    """
    on_cpu = name.startswith("cpu")
    known = CLASSES[DEFAULT_CPU if on_cpu else DEFAULT_CARD]
    if given is not None and given.lower() not in CLASSES:
        match = _RATE.fullmatch(given.strip())
        if match is None or not float(match[1]):
            raise ValueError(
                f"speed {name}={given}: give a rate such as 20TFLOPS, or one of {', '.join(sorted(CLASSES))}"
            )
        return float(match[1]) * {"G": 1e9, "T": 1e12}[match[2].upper()], known.bandwidth * REACHED, f"given, {given}"
    chosen = (given or (DEFAULT_CPU if on_cpu else DEFAULT_CARD)).lower()
    known = CLASSES[chosen]
    peak = known.single if precision == "fp32" else known.half
    return REACHED * peak, REACHED * known.bandwidth, f"half of what a {chosen} publishes"


def read_speeds(text: str | None) -> dict[str, str]:
    """``"cuda:0=rtx4090,cpu=200GFLOPS"`` as a mapping.

    Raises:
        ValueError: an entry that is not DEVICE=SPEED.
    """
    result = {}
    for piece in (text or "").split(","):
        if not piece.strip():
            continue
        name, sign, value = piece.partition("=")
        if not sign or not name.strip() or not value.strip():
            raise ValueError(f"{piece.strip()!r} in speed {text!r} is not DEVICE=SPEED; write e.g. cuda:0=rtx3070")
        result[name.strip().lower()] = value.strip()
    return result


def given_speed(speeds: Mapping[str, str], name: str) -> str | None:
    """What was said of a device, by its name or its kind."""
    return speeds.get(name, speeds.get(name.split(":")[0]))


def make_machine(
    devices: Sequence[Device],
    measured: Mapping[str, tuple[float, float]],
    speeds: Mapping[str, str],
    precision: str,
    links: Mapping[tuple[int, int], float] | None = None,
    update_rates: Mapping[str, float] | None = None,
) -> Machine:
    """A machine from what was measured, and nominal figures for the rest.

    Args:
        devices: in order.
        measured: device name -> (FLOP/s, bytes/s).
        speeds: device name or kind -> a class or a rate that replaces what was measured.
        precision: of the training.
        links: bytes/s by (from, to) index.
        update_rates: bytes/s by device name; default: the memory's bandwidth.
    """
    flops, bandwidths, rates, made_up = [], [], [], {}
    for device in devices:
        given = given_speed(speeds, device.name)
        if given is None and device.name in measured:
            rate, bandwidth = measured[device.name]
        else:
            rate, bandwidth, made_up[device.name] = nominal_speed(device.name, given, precision)
        flops.append(rate)
        bandwidths.append(bandwidth)
        update = (update_rates or {}).get(device.name, bandwidth)
        rates.append(Speed(update, bandwidth / 4))
    return Machine(tuple(devices), tuple(flops), tuple(bandwidths), tuple(rates), links or {}, made_up)
