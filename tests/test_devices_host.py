"""What the host says of itself, read from files that the tests write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spu.devices import host as hostinfo

GB = 10**9


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with 32 GB, 20 GB of it available, four cores, and no cgroup files."""
    monkeypatch.setattr(hostinfo, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(hostinfo, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(hostinfo, "_CPUS", tmp_path / "cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    write(
        tmp_path / "proc/meminfo",
        f"MemTotal: {32 * GB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {20 * GB // 1024} kB\n",
    )
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_memory_without_a_container_is_the_systems(host: Path) -> None:
    assert hostinfo.host_memory() == (32 * GB, 20 * GB)


V2_LIMITS: dict[str, tuple[str, dict[str, str], tuple[int, int]]] = {
    "the page cache counts as available": (
        "/user/job",
        {
            "user/job/memory.max": f"{8 * GB}",
            "user/job/memory.current": f"{5 * GB}",
            "user/job/memory.stat": f"anon 1\ninactive_file {2 * GB}\nfile 3",
            "user/memory.max": "max",
        },
        (8 * GB, 5 * GB),
    ),
    "a parent's": ("/user/job", {"user/job/memory.max": "max", "user/memory.max": f"{6 * GB}"}, (6 * GB, 6 * GB)),
    # The path in /proc/self/cgroup can be the host's, which the container cannot see.
    "the root group": ("/docker/0123", {"memory.max": f"{4 * GB}", "memory.current": f"{GB}"}, (4 * GB, 3 * GB)),
    "a full container's": ("/", {"memory.max": f"{4 * GB}", "memory.current": f"{5 * GB}"}, (4 * GB, 0)),
}


@pytest.mark.parametrize(("group", "files", "expected"), V2_LIMITS.values(), ids=V2_LIMITS)
def test_a_v2_limit_binds(host: Path, group: str, files: dict[str, str], expected: tuple[int, int]) -> None:
    write(host / "proc/self/cgroup", f"0::{group}\n")
    for name, text in files.items():
        write(host / "cgroup" / name, f"{text}\n")
    assert hostinfo.host_memory() == expected


def test_a_v1_limit_binds_and_its_no_limit_does_not(host: Path) -> None:
    write(host / "proc/self/cgroup", "5:cpuset:/\n4:memory:/job\n0::/\n")
    limit = host / "cgroup/memory/job/memory.limit_in_bytes"
    write(limit, "9223372036854771712\n")
    assert hostinfo.host_memory() == (32 * GB, 20 * GB)
    write(limit, f"{3 * GB}\n")
    write(limit.with_name("memory.usage_in_bytes"), f"{2 * GB}\n")
    write(limit.with_name("memory.stat"), f"total_inactive_file {GB}\n")
    assert hostinfo.host_memory() == (3 * GB, 2 * GB)


@pytest.mark.parametrize("text", ["", "nonsense", "0::", "a:b", "::::"])
def test_a_malformed_cgroup_file_is_no_limit(host: Path, text: str) -> None:
    write(host / "proc/self/cgroup", text)
    assert hostinfo.host_memory() == (32 * GB, 20 * GB)
    assert hostinfo.effective_cores() == 4


def test_without_meminfo_three_quarters_of_the_memory_count_as_available(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (host / "proc/meminfo").unlink()
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}[name])
    assert hostinfo.host_memory() == (4096000, 3072000)


def test_where_nothing_is_known_a_size_is_assumed_aloud(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> int:
        raise ValueError(name)

    (host / "proc/meminfo").unlink()
    monkeypatch.setattr(os, "sysconf", refuse)
    with pytest.warns(UserWarning, match="8 GB assumed"):
        assert hostinfo.host_memory()[0] == 8 * GB


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("bad", 4)])
def test_a_v2_cpu_quota_limits_the_cores(host: Path, quota: str, cores: int) -> None:
    write(host / "proc/self/cgroup", "0::/job\n")
    write(host / "cgroup/job/cpu.max", quota)
    assert hostinfo.effective_cores() == cores


def test_a_v1_cpu_quota_limits_the_cores(host: Path) -> None:
    write(host / "proc/self/cgroup", "3:cpu,cpuacct:/job\n")
    write(host / "cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", "300000\n")
    write(host / "cgroup/cpu,cpuacct/job/cpu.cfs_period_us", "100000\n")
    assert hostinfo.effective_cores() == 3
    write(host / "cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", "-1\n")
    assert hostinfo.effective_cores() == 4


def test_hyperthreads_are_put_side_by_side_and_counted_once(host: Path) -> None:
    for core in range(4):
        write(host / f"cpu/cpu{core}/topology/physical_package_id", "0")
        write(host / f"cpu/cpu{core}/topology/core_id", str(core % 2))
    assert hostinfo.usable_cores() == [0, 2, 1, 3]
    assert hostinfo.physical_cores([0, 2]) == 1
    assert hostinfo.physical_cores([0, 1]) == 2
    assert hostinfo.one_of_each_core([2, 0, 1, 3]) == [2, 1]


def test_without_a_topology_every_core_is_its_own(host: Path) -> None:
    assert hostinfo.usable_cores() == [0, 1, 2, 3]
    assert hostinfo.physical_cores([0, 1, 2]) == 3


def test_the_processors_name_is_read_or_made_up(host: Path) -> None:
    write(host / "proc/cpuinfo", "processor: 0\nmodel name\t: Quick CPU 9\n")
    assert hostinfo.cpu_model() == "Quick CPU 9"
    (host / "proc/cpuinfo").unlink()
    assert hostinfo.cpu_model()


def test_the_real_host_has_memory_and_cores() -> None:
    total, available = hostinfo.host_memory()
    assert 0 < available <= total
    assert 1 <= hostinfo.effective_cores() <= len(hostinfo.usable_cores())


def test_what_others_take_of_the_cores_is_counted_without_our_own_work(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of the cores that may be used, waiting left out; others worked 1.5 of 4 cores, we a quarter of one."""
    line = "cpu{} {} 3 {} 900 40 {} 0 0 7 0\n"
    assert hostinfo.cores_of_others(0.0) is None  # nothing to read
    before = ["cpu 9 9 9 9\n", *(line.format(core, 50, 2, 1) for core in range(5)), "intr 1 2\n"]
    write(host / "proc/stat", "".join(before))
    ticks = os.sysconf("SC_CLK_TCK")
    clock = {"now": 10.0, "own": 1.0}

    def sleep(seconds: float) -> None:
        clock["now"], clock["own"] = clock["now"] + seconds, clock["own"] + seconds / 4
        worked = [ticks, ticks // 2, ticks // 4, 0, 50 * ticks]  # the fifth core is not ours
        after = [line.format(core, 50 + more, 2, 1) for core, more in enumerate(worked)]
        write(host / "proc/stat", "".join(after))

    monkeypatch.setattr(hostinfo.time, "sleep", sleep)
    monkeypatch.setattr(hostinfo.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(hostinfo.time, "process_time", lambda: clock["own"])
    assert hostinfo.cores_of_others(1.0) == pytest.approx(1.5)


def test_cores_of_one_speed_are_one_kind(host: Path) -> None:
    assert hostinfo.core_kinds([2, 0, 1, 3]) == [[2, 0, 1, 3]]
    for core, capacity in enumerate((1024, 1009, 1024, 1009)):  # some turn up a little higher
        write(host / f"cpu/cpu{core}/cpu_capacity", f"{capacity}\n")
    assert hostinfo.core_kinds([2, 0, 1, 3]) == [[2, 0, 1, 3]]
    assert hostinfo.core_kinds([]) == []


def test_machines_of_one_name_are_told_apart(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostinfo.platform, "node", lambda: "localhost")
    names = {hostinfo.machine_name()}
    for boot in ("one", "another"):
        write(host / "proc/sys/kernel/random/boot_id", f"{boot}\n")
        names |= {hostinfo.machine_name(), hostinfo.machine_name()}
    assert len(names) == 3


def test_kinds_are_told_by_capacity(host: Path) -> None:
    for core, capacity in enumerate((250, 1024, 766, 250)):
        write(host / f"cpu/cpu{core}/cpu_capacity", f"{capacity}\n")
    assert hostinfo.core_kinds([0, 1, 2, 3]) == [[1], [2], [0, 3]]


def test_kinds_are_told_by_counters_where_no_capacity_is_given(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostinfo, "_CPUS", host / "devices/system/cpu")
    write(host / "devices/cpu_atom/cpus", "8-9,12\n")
    assert hostinfo.core_kinds([0, 1, 8, 9, 12, 13]) == [[0, 1, 13], [8, 9, 12]]
    write(host / "devices/cpu_atom/cpus", "what\n")
    assert hostinfo.core_kinds([0, 8]) == [[0, 8]]
