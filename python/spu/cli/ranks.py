"""``spu devices`` and ``spu doctor`` under torchrun: what each process sees, and the links between them."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from spu.cli import doctor
from spu.cli.devices import doctor_lines, per_second, speed_row
from spu.common.units import columns
from spu.devices.manager import DeviceManager
from spu.devices.speed import measure_device
from spu.devices.tiers import split_budget
from spu.distributed.job import Job
from spu.distributed.links import RankLink, every_pair, measure_links

__all__ = ["device_lines_of_all", "doctor_lines_of_all"]

_WAIT_S = 120  # for a process that does not come, or hangs


def device_lines_of_all(spec: str, budget: str | None, refresh: bool) -> list[str]:
    """Return, in rank 0, the lines of ``spu devices`` for all processes, and none in the others; called in each.

    Raises:
        ValueError: an unknown device or budget, in any process.
    """
    own: Any = spec if budget is None and spec == "auto" else DeviceManager(split_budget(budget)[0]).get_devices(spec)
    return _in_all(own, lambda job: _devices(job, refresh))


def doctor_lines_of_all() -> list[str]:
    """Return the lines of ``spu doctor``, likewise."""
    try:
        return _in_all("auto", _doctor)
    except (RuntimeError, ConnectionError, TimeoutError) as error:  # a broken connection is what it is asked about
        row = doctor.Row("processes", False, f"{type(error).__name__}: {' '.join(str(error).split())}")
        return [*doctor_lines(), *doctor_lines([row])]


def _in_all(devices: Any, lines: Callable[[Job], list[str]]) -> list[str]:
    job = Job(devices, timeout_s=_WAIT_S)
    try:
        return lines(job)
    finally:
        job.close()


def _devices(job: Job, refresh: bool) -> list[str]:
    speed = measure_device(job.device, refresh=refresh)  # all at once, as a training uses them
    everyones = job.gathered((platform.node(), *speed_row(job.device, speed)))
    links = measure_links(job, every_pair(job.size))
    if job.rank != 0:
        return []
    head = ("device", "host", "memory", "budget", "fp32", "bf16", "fp16", "memory speed", "what")
    rows = [(name, host, *rest) for host, name, *rest in everyones]
    return [*columns([head, *rows]), "", *columns([("link", "bandwidth", "latency"), *map(_link_row, links)])]


def _doctor(job: Job) -> list[str]:
    everyones = job.gathered((platform.node(), job.device.description, doctor.report()))
    links = measure_links(job, every_pair(job.size))
    if job.rank != 0:
        return []
    hosts = sorted({host for host, *_ in everyones})
    slow = min(links, key=lambda link: link.bytes_per_s)
    far = max(links, key=lambda link: link.latency_s)
    text = (
        f"{job.size} on {len(hosts)} {'machine' if len(hosts) == 1 else 'machines'} ({', '.join(hosts)}) over "
        f"{job.transport}; slowest link rank{slow.source} -> rank{slow.target} {per_second(slow.bytes_per_s)}, longest "
        f"latency {far.latency_s * 1e6:.0f} us (rank{far.source} - rank{far.target}); `spu devices` has all"
    )
    first = everyones[0][2]
    lines = [*doctor_lines([*first, doctor.Row("processes", True, text)])]
    for rank, (host, description, rows) in enumerate(everyones):
        if rank:
            others = [row for row in rows if row not in first]
            lines.append(f"rank{rank} on {host}, {description}: {'as rank0' if not others else 'but for'}")
            lines += [f"  {line}" for line in doctor_lines(others)] if others else []
    return lines


def _link_row(link: RankLink) -> tuple[str, str, str]:
    name = f"rank{link.source} -> rank{link.target}"
    return name, per_second(link.bytes_per_s), f"{link.latency_s * 1e6:.0f} us"
