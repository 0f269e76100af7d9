"""Measured layer times that are remembered, and brought up to date with how fast the devices are right now.

A core's clock, and what neighbours take of a shared machine, move by a third within the hour. So a reference product is
timed beside the layers, on all devices side by side; when remembered times are used it is timed again, and they are
scaled by the ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from spu.devices import Device
from spu.side_by_side import side_by_side
from spu.speed import cached_values, identity, linear_identity

__all__ = ["reference_seconds", "remembered"]

Rows = list[list[tuple[float, float]]]
"""[devices][layers] (forward, backward) seconds."""

_SIDE, _RUNS = 384, 15


def remembered(key: dict[str, Any] | None, devices: Sequence[Device], measure: Callable[[], Rows]) -> Rows:
    """Seconds of layers as measured before for the same ``key`` on the same devices, else measured now.

    Args:
        key: JSON of what decides the seconds beside the devices; None for what must not be remembered.
        devices: side by side.
        measure: makes the rows.
    """
    if key is None:
        return measure()
    full = {"what": "layers", **key, "devices": [identity(d) for d in devices], "linear": linear_identity()}
    count = len(key["kinds"]) + 1
    cells = [f"{d}.{k}.{part}" for d in range(len(devices)) for k in range(count) for part in "fb"]
    fresh: list[Rows] = []

    def values() -> dict[str, float]:
        before = reference_seconds(devices)
        fresh.append(measure())
        after = reference_seconds(devices)
        flat = [seconds for row in fresh[0] for pair in row for seconds in pair]
        beside = {f"{d}.reference": (a + b) / 2 for d, (a, b) in enumerate(zip(before, after))}
        return dict(zip(cells, flat, strict=True)) | beside

    found = cached_values(full, [*cells, *(f"{d}.reference" for d in range(len(devices)))], values)
    if fresh:
        return fresh[0]
    rows = []
    for d, now in enumerate(reference_seconds(devices)):
        factor = now / found[f"{d}.reference"] if found[f"{d}.reference"] > 0 else 1.0
        rows.append([(factor * found[f"{d}.{k}.f"], factor * found[f"{d}.{k}.b"]) for k in range(count)])
    return rows


def reference_seconds(devices: Sequence[Device]) -> list[float]:
    """Median seconds of an fp32 product on each device, all of them at it at the same time."""

    def body(device: Device, start: Callable[[], Any]) -> float:
        x = torch.ones(_SIDE, _SIDE, device=device.torch_device)
        wait = torch.cuda.synchronize if device.torch_device.type == "cuda" else None

        def once() -> float:
            begin = time.perf_counter()
            torch.mm(x, x)
            if wait is not None:
                wait(device.torch_device)
            return time.perf_counter() - begin

        once()
        start()
        return statistics.median(once() for _ in range(_RUNS))

    return side_by_side(devices, body)
