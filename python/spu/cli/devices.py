"""``spu devices`` and ``spu doctor`` as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from spu.cli import doctor
from spu.common.units import columns, format_bytes
from spu.devices.manager import Device, DeviceManager
from spu.devices.speed import DeviceSpeed, measure_device, measure_link, measure_loopback
from spu.devices.tiers import split_budget

__all__ = ["device_lines", "doctor_lines", "per_second", "speed_row"]

_BUSY = "busy: not remembered"


def device_lines(spec: str, budget: str | None, refresh: bool = False) -> list[str]:
    """Return a table of devices with measured speeds, and one of the links between them.

    Raises:
        ValueError: an unknown device or budget.
    """
    found = DeviceManager(split_budget(budget)[0]).get_devices(spec)
    rows: list[tuple[str, ...]] = [("device", "memory", "budget", "fp32", "bf16", "fp16", "memory speed", "what")]
    rows += [speed_row(device, measure_device(device, refresh=refresh)) for device in found]
    lines = columns(rows)
    pairs = [(a, b) for a in found for b in found if a is not b]
    if pairs:
        links = [("link", "bandwidth"), *(row for a, b in pairs for row in _link(a, b, refresh))]
        links.append(("loopback, between two processes", per_second(measure_loopback(refresh=refresh))))
        lines += ["", *columns(links)]
    return lines


def speed_row(device: Device, speed: DeviceSpeed) -> tuple[str, ...]:
    """Return a device's row: its name, memory and budget, its speeds, and what it is."""
    return (
        device.name,
        format_bytes(device.memory_bytes),
        format_bytes(device.budget_bytes),
        *(_flops(value) for value in (speed.fp32, speed.bf16, speed.fp16)),
        per_second(speed.memory_bandwidth),
        f"{device.description}{'; ' + _BUSY if speed.busy else ''}",
    )


def _link(a: Device, b: Device, refresh: bool) -> list[tuple[str, str]]:
    """Return a row, or two where the host's memory may be page-locked or pageable."""
    kinds = [("", True)]
    if {a.torch_device.type, b.torch_device.type} == {"cpu", "cuda"}:
        kinds = [(", page-locked", True), (", pageable", False)]
    rows = []
    for words, pinned in kinds:
        speed = measure_link(a, b, pinned=pinned, refresh=refresh)
        busy = f" ({_BUSY})" if speed.busy else ""
        rows.append((f"{a.name} -> {b.name}{words}", f"{per_second(speed.bytes_per_s)}{busy}"))
    return rows


def _flops(value: float) -> str:
    return f"{value / 1e12:.1f} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.1f} GFLOP/s"


def per_second(value: float) -> str:
    """Return a rate of bytes."""
    return f"{format_bytes(value)}/s"


def doctor_lines(rows: Sequence[doctor.Row] | None = None) -> list[str]:
    """Return lines about every part: whether it works, and if not, the command that adds it.

    Args:
        rows: about what; default: what `spu.cli.doctor.report` finds here.
    """
    lines = []
    rows = doctor.report() if rows is None else rows
    width = max(len(row.name) for row in rows)
    for row in rows:
        lines.append(f"{'ok' if row.works else '--'}  {row.name:<{width}}  {row.detail}")
        if row.fix:
            lines.append(f"    {'':<{width}}  add it: {row.fix}")
    return lines
