"""``spu devices`` and ``spu doctor`` in two processes: rank 0 prints what each sees, and the measured links."""

from __future__ import annotations

import contextlib
import io
import platform
import re
from typing import Any

import pytest
import torch.distributed as dist
from ranks import in_ranks

from spu.cli import doctor, ranks
from spu.cli.app import main
from spu.devices.speed import DeviceSpeed
from spu.distributed.job import Job
from spu.distributed.links import every_pair, measure_links


def say(*words: str) -> tuple[str, Any]:
    """What a command prints in this process, and how it ends; rank 1 has another Python, and half of rank 0's speed."""
    rank = dist.get_rank()
    rows = [
        doctor.Row("python", True, f"3.{11 + rank}"),
        doctor.Row("torch", True, "2.13.0"),
        doctor.Row("g++", False, "none"),
    ]
    doctor.report = lambda: rows  # type: ignore[assignment]
    speed = DeviceSpeed(2e11 / (rank + 1), 1e9, 1e9, 5e9)
    ranks.measure_device = lambda device, refresh: speed  # type: ignore[attr-defined]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(list(words))
    return out.getvalue()


def both() -> list[str]:
    return [say("devices"), say("doctor")]


def test_rank_0_prints_what_all_processes_see() -> None:
    first, second = in_ranks(2, both)
    assert second == ["", ""]
    table, links = first[0].strip().split("\n\n")
    head, *rows = table.splitlines()
    assert head.split()[:4] == ["device", "host", "memory", "budget"]
    for rank, (row, speed) in enumerate(zip(rows, ("200.0 GFLOP/s", "100.0 GFLOP/s"), strict=True)):
        assert row.startswith(f"rank{rank}")
        assert platform.node() in row
        assert speed in row
    head, *rows = links.splitlines()
    assert head.split() == ["link", "bandwidth", "latency"]
    assert [row.split("  ")[0] for row in rows] == ["rank0 -> rank1", "rank1 -> rank0"]
    assert all(re.search(r"B/s +\d+ us$", row) for row in rows)
    lines = first[1].splitlines()
    assert lines[0].split() == ["ok", "python", "3.11"]
    assert re.match(rf"ok  processes  2 on 1 machine \({platform.node()}\) over gloo; slowest link rank", lines[3])
    assert lines[4].startswith(f"rank1 on {platform.node()}, ")
    assert lines[4].endswith("but for")
    assert lines[5].split() == ["ok", "python", "3.12"]
    assert len(lines) == 6  # what both have is there once


def measured() -> list[tuple[int, int, float, float]]:
    job = Job()
    found = measure_links(job, every_pair(job.size))
    return [(link.source, link.target, link.bytes_per_s, link.latency_s) for link in found]


def test_links_are_measured_both_ways_and_known_to_all() -> None:
    first, second = in_ranks(2, measured)
    assert first == second
    assert [row[:2] for row in first] == [(0, 1), (1, 0)]
    for _, _, rate, latency in first:
        assert 1e6 < rate < 1e12
        assert 1e-6 < latency < 1.0


@pytest.mark.parametrize(("size", "count"), [(1, 0), (2, 1), (8, 28), (9, 9)])
def test_of_many_processes_neighbours_are_measured(size: int, count: int) -> None:
    pairs = every_pair(size)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == count
    assert {k for pair in pairs for k in pair} == (set(range(size)) if size > 1 else set())
