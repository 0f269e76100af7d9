"""The cores and the memory of this machine, within the limits of a container (cgroup v1 and v2).

Everything is read from files of the system. Where one is missing, the machine has no such limit.
"""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = [
    "core_kinds",
    "cores_of_others",
    "cpu_model",
    "effective_cores",
    "host_memory",
    "machine_name",
    "one_of_each_core",
    "physical_cores",
    "usable_cores",
]

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")
_ALIKE = 0.8  # of the fastest core's capacity
# A cgroup without a limit says "max" (v2) or a number near 2**63 (v1).
_NO_LIMIT = 1 << 60


def usable_cores() -> list[int]:
    """Return the logical cores that this process may use, those of one physical core side by side."""
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))
    return sorted(cores, key=lambda core: (*_physical_core(core), core))


def effective_cores() -> int:
    """Return how many cores this process may use: no more than a container's CPU quota."""
    count = len(usable_cores())
    quota = None
    for directory in _cgroup_dirs("cpu"):
        try:
            if (directory / "cpu.max").exists():
                limit, period = (directory / "cpu.max").read_text().split()
            else:
                limit, period = ((directory / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            if limit not in ("max", "-1"):
                share = float(limit) / float(period)
                quota = share if quota is None else min(quota, share)
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return count if quota is None else max(1, min(count, int(quota)))


def cores_of_others(seconds: float = 0.3) -> float | None:
    """Return how many of the usable cores other processes keep busy now, measured for so many seconds; None where the
    system does not say.
    """
    cores = {f"cpu{core}" for core in usable_cores()}
    before, own, begin = _busy_ticks(cores), time.process_time(), time.perf_counter()
    if not before:
        return None
    time.sleep(seconds)
    ticks = _busy_ticks(cores) - before
    passed, own = time.perf_counter() - begin, time.process_time() - own
    return min(float(len(cores)), max(0.0, (ticks / os.sysconf("SC_CLK_TCK") - own) / passed))


def _busy_ticks(cores: Iterable[str]) -> int:
    """Return the clock ticks that these cores have worked since the system's start; 0 where it does not say.

    A line is "cpu0 user nice system idle iowait irq softirq steal ...".
    """
    try:
        rows = [line.split() for line in (_PROC / "stat").read_text().splitlines()]
        times = [list(map(int, row[1:9])) for row in rows if row and row[0] in cores]
    except (OSError, ValueError):
        return 0
    return sum(sum(row[:3]) + sum(row[5:]) for row in times)


def physical_cores(cores: Iterable[int]) -> int:
    """Return how many physical cores these logical ones belong to."""
    return len(one_of_each_core(cores))


def one_of_each_core(cores: Iterable[int]) -> list[int]:
    """Return the first of the logical cores of each physical one."""
    found: dict[tuple[int, int], int] = {}
    for core in cores:
        found.setdefault(_physical_core(core), core)
    return list(found.values())


def _physical_core(core: int) -> tuple[int, int]:
    """Return (package, core in it), the same for hyperthreads of one core; unique where the system does not say."""
    topology = _CPUS / f"cpu{core}" / "topology"
    package, inner = _read_int(topology / "physical_package_id"), _read_int(topology / "core_id")
    return (package, inner) if package is not None and inner is not None else (0, core)


def core_kinds(cores: Sequence[int]) -> list[list[int]]:
    """Return cores in groups of about the same speed, the fastest first, each in the order given.

    A processor may have fast cores and small ones. Linux gives each core's capacity where it schedules by it
    (``cpu_capacity``, 1024 of the fastest); before that, Intel's small ones have counters of their own (``cpu_atom``).
    """
    small = _numbers(_CPUS.parent.parent / "cpu_atom" / "cpus")
    speeds = {core: _read_int(_CPUS / f"cpu{core}" / "cpu_capacity") for core in cores}
    if None in speeds.values():
        speeds = {core: 512 if core in small else 1024 for core in cores}
    kinds: list[list[int]] = []
    fastest = 0
    for speed in sorted({speed for speed in speeds.values() if speed is not None}, reverse=True):
        alike = [core for core in cores if speeds[core] == speed]
        if kinds and speed >= _ALIKE * fastest:  # of one kind, some may go a little faster
            kinds[-1] += alike
        else:
            kinds.append(alike)
            fastest = speed
    return [sorted(kind, key=cores.index) for kind in kinds]


def _numbers(path: Path) -> set[int]:
    """Return the numbers in a file such as "0-3,8"; none where it is not to be read."""
    try:
        parts = [part.split("-") for part in path.read_text().strip().split(",") if part]
        return {number for part in parts for number in range(int(part[0]), int(part[-1]) + 1)}
    except (OSError, ValueError):
        return set()


def machine_name() -> str:
    """Return what tells this machine from others, also from one of the same name."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{platform.node()} {boot}"


def cpu_model() -> str:
    """Return the processor's name."""
    try:
        for line in (_PROC / "cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"


def host_memory() -> tuple[int, int]:
    """Return (total, available) bytes of the host, or of the container that this process runs in."""
    total, available = _system_memory()
    for directory in _cgroup_dirs("memory"):
        v2 = (directory / "memory.max").exists()
        limit = _read_int(directory / ("memory.max" if v2 else "memory.limit_in_bytes"))
        if limit is None or limit >= _NO_LIMIT:
            continue
        used = _read_int(directory / ("memory.current" if v2 else "memory.usage_in_bytes")) or 0
        # The page cache counts as used, but is freed on demand.
        cache = _stat(directory / "memory.stat", "inactive_file" if v2 else "total_inactive_file")
        total = min(total, limit)
        available = min(available, max(0, limit - max(0, used - cache)))
    return total, min(available, total)


def _system_memory() -> tuple[int, int]:
    total, available = _stat(_PROC / "meminfo", "MemTotal:") * 1024, _stat(_PROC / "meminfo", "MemAvailable:") * 1024
    if not total:
        try:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            total = 8 * 10**9
            warnings.warn("the host's memory is unknown, 8 GB assumed; say --budget cpu=SIZE", stacklevel=2)
    # Without MemAvailable (macOS) three quarters are taken as free.
    return total, available or total * 3 // 4


def _cgroup_dirs(controller: str) -> list[Path]:
    """Return the directories of this process's cgroup for ``controller`` and its parents, any of which may limit it."""
    found: list[Path] = []
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, names, path = [*line.split(":", 2), "", "", ""][:3]
        if names and controller not in names.split(","):
            continue
        root = _CGROUP / names if names else _CGROUP
        here = root / path.strip("/")
        # Inside a container the path may be the host's, and not exist: then the root is this process's own group.
        found += [d for d in (here, *here.parents) if d.is_relative_to(root) and d.is_dir()]
    return found


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text().strip())
    except (OSError, ValueError):
        return None


def _stat(path: Path, key: str) -> int:
    """Return the number after ``key`` in a file of "key number" lines; 0 when there is none."""
    try:
        for line in path.read_text().splitlines():
            fields = line.split()
            if fields and fields[0] == key:
                return int(fields[1])
    except (OSError, ValueError, IndexError):
        pass
    return 0
