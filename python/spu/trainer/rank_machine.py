"""The machine that processes of several machines plan for: what they are, how fast they are, and their links.

Counted costs are balanced over nominal speeds where all processes have the same kind of CPU, so that the same command
gives the same stages every time. Else each process measures its device, all at once, and layers go in proportion. Links
are measured only where ``transfer="auto"`` asks which of them are slow, and between machines alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from spu.common.dtypes import DTYPES
from spu.cost.measure import time_packing
from spu.devices.host import machine_name
from spu.devices.manager import Device
from spu.devices.speed import identity, measure_device
from spu.distributed.job import Job
from spu.distributed.links import measure_links
from spu.plan.machine import Machine, Speed
from spu.plan.request import crossings
from spu.settings import AUTO, Settings

__all__ = ["measured_machine"]

CODEC = "int8"  # of links that are slow


def measured_machine(job: Job, settings: Settings) -> Machine | None:
    """Return the first pipeline's devices with what was measured of them; None where nominal figures do.

    Called in every process, and the same in each. A place of several pipelines is as fast as the slowest process there.
    Links are those that stages cross; the other ones are infinitely fast.
    """
    places = len(job.devices)
    told = job.gathered((_kind(job.device), _host()))
    kinds, hosts = {kind for kind, _ in told}, [host for _, host in told][:places]
    unlike = len(kinds) > 1 or job.device.torch_device.type != "cpu"
    crossed = {(a, b) for a, b in crossings(settings, range(places)) if a != b} if settings.transfer == AUTO else set()
    far = sorted({(min(pair), max(pair)) for pair in crossed if hosts[pair[0]] != hosts[pair[1]]})
    if not unlike and not far:
        return None
    flops, bandwidth = 5e10 * job.device.threads, 5e9 * job.device.threads  # as `spu.trainer.planner` takes them
    if unlike:
        found = measure_device(job.device)
        flops, bandwidth = max(getattr(found, settings.precision), 1.0), found.memory_bandwidth
    packing = time_packing([job.device], DTYPES[settings.precision], CODEC)[0] if far else float("inf")
    rows = job.gathered((_coarse(flops), _coarse(bandwidth), packing))
    speeds = [_slowest(rows[place::places]) for place in range(places)]
    links = {(link.source, link.target): link.bytes_per_s for link in measure_links(job, far)}
    every = {(a, b): links.get((a, b), float("inf")) for a in range(places) for b in range(places) if a != b}
    return Machine(tuple(job.devices), tuple(speeds), every)


def _slowest(rows: Sequence[tuple[float, float, float]]) -> Speed:
    flops, bandwidth, packing = (min(values) for values in zip(*rows))
    return Speed(flops, bandwidth, pack_rate=packing)


def _coarse(value: float) -> float:
    """Return two digits of a figure: the rest is noise, which would move layers."""
    return float(f"{value:.1e}")


def _kind(device: Device) -> str:
    """Return what a device is, without what differs between equal ones: cores, the number of threads, an index."""
    known = identity(device)
    return repr(sorted((name, value) for name, value in known.items() if name not in ("cores", "threads", "index")))


def _host() -> str:
    """Return what tells the machine from others, and the network that a process is in from others on it."""
    network = os.readlink("/proc/self/ns/net") if Path("/proc/self/ns/net").is_symlink() else ""
    return f"{machine_name()} {network}"
