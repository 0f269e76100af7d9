"""How a new run is cut into microbatches, and in which order they run, where the user does not say.

On CPUs a microbatch costs time whatever its size: Python, the graph, products of few rows. A pipeline wants many of
them, so that no stage waits long for its first. The rule counts tokens and devices and reads no clock, so the same
command makes the same run every time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from spu.devices.manager import Device, DeviceManager, default_devices
from spu.devices.tiers import split_budget
from spu.train.config import TrainConfig

__all__ = ["LEAST_TOKENS", "with_defaults"]

LEAST_TOKENS = 512
"""Of a microbatch on CPUs. Of the default job's step (1,024 tokens, two stages of one core, AVX-512) eight microbatches
of 128 tokens took 1.6 times the processor time of two of 512."""

_MOST = 8


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a new run with ``microbatches`` and ``schedule``, where they are not given.

    On CPUs alone: at most 8 microbatches of the same size with ``LEAST_TOKENS`` tokens or more, but at least one for
    each device; and, in 16 bits and within the memory there is, the schedule ``zb``, which has little to wait for also
    with few microbatches. Elsewhere: 8 microbatches, or the batch's rows if they are fewer, and ``1f1b``.

    Args:
        given: the settings of ``TrainConfig`` that the user has named.

    Raises:
        ValueError: an unknown device or a budget that is none.
    """
    config = TrainConfig(**{"microbatches": 1, **given})
    devices = _devices(config)
    on_cpus = all(device.torch_device.type == "cpu" for device in devices)
    rows = max(1, config.batch // (config.accumulate * config.replicas))
    chosen: dict[str, Any] = {}
    if "microbatches" not in given:
        chosen["microbatches"] = _microbatches(rows, config.seq, len(devices)) if on_cpus else min(_MOST, rows)
    if "schedule" not in given and _zero_bubble(config, devices) and on_cpus:
        chosen["schedule"] = "zb"
    return {**chosen, **given}


def _devices(config: TrainConfig) -> list[Device]:
    budget, tiers = split_budget(config.budget)
    found = DeviceManager(budget).get_devices(default_devices(config.devices, config.residency, tiers.disk))
    if config.engine != "distributed":
        return found
    return found[:1] * max(1, int(os.environ.get("WORLD_SIZE", "1")) // config.replicas)  # one in each process


def _microbatches(rows: int, tokens: int, devices: int) -> int:
    """Return into how many microbatches a run's rows of so many tokens are cut."""
    most = min(rows, max(devices, min(_MOST, rows * tokens // LEAST_TOKENS)))
    return max(count for count in range(1, most + 1) if rows % count == 0 or count == devices)


def _zero_bubble(config: TrainConfig, devices: list[Device]) -> bool:
    """Tell whether weight gradients are to be made in the pauses of a pipeline: they wait in memory until then."""
    plain = config.virtual is None and config.budget is None and config.lora is None
    return plain and len(devices) > 1 and config.precision != "fp32" and config.residency in ("auto", "resident")
