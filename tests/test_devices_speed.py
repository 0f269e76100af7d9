"""Device and link speeds: plausible, remembered, and never taken from a cache entry that is about something else."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spu.cli.devices import device_lines
from spu.devices import speed
from spu.devices.manager import Device, DeviceManager
from spu.devices.speed import cache_directory, measure_device, measure_link


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every measuring thread have its core to itself, whatever the machine does."""
    monkeypatch.setattr(speed, "thread_time", itertools.count(step=3600).__next__)  # an hour for each figure


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cpus() -> list[Device]:
    return DeviceManager().get_devices("cpu,cpu")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the measurements, and lists them."""
    calls: list[str] = []

    def stand_in(name: str, value: float) -> Callable[..., float]:
        def measure(*args: Any) -> float:
            calls.append(name)
            return value + len(calls)

        return measure

    monkeypatch.setattr(speed, "_flops", stand_in("flops", 1e9))
    monkeypatch.setattr(speed, "_copy_bandwidth", stand_in("copy", 1e10))
    monkeypatch.setattr(speed, "_link_bandwidth", stand_in("link", 1e10))
    return calls


def test_a_real_device_and_link_are_measured_and_remembered(cache: Path, cpus: list[Device]) -> None:
    rng, threads = torch.get_rng_state(), torch.get_num_threads()
    found = measure_device(cpus[0])
    for name, value in dataclasses.asdict(found).items():
        assert name == "busy" or 1e7 < value < 1e15, f"{name}: {value}"
    link = measure_link(cpus[0], cpus[1])
    assert 1e7 < link.bytes_per_s < 1e13
    assert measure_device(cpus[0]) == found
    assert measure_link(cpus[0], cpus[1]) == link
    assert len(list(cache.iterdir())) == 2
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_num_threads() == threads


def test_the_loopback_is_measured_and_remembered(cache: Path) -> None:
    found = speed.measure_loopback()
    assert 1e7 < found < 1e12
    assert speed.measure_loopback() == found


def test_pageable_memory_is_a_link_of_its_own(cache: Path, cpus: list[Device], counted: list[str]) -> None:
    gpu = dataclasses.replace(cpus[1], name="cuda:0")
    pinned, pageable = (measure_link(cpus[0], gpu, pinned=how) for how in (True, False))
    assert pinned != pageable
    assert measure_link(cpus[0], gpu, pinned=False) == pageable
    assert counted == ["link", "link"]


def test_a_second_look_measures_nothing_and_refresh_measures_again(
    cache: Path, cpus: list[Device], counted: list[str]
) -> None:
    first = measure_device(cpus[0])
    assert sorted(counted) == ["copy", "flops", "flops", "flops"]
    assert measure_device(cpus[0]) == first
    assert len(counted) == 4
    again = measure_device(cpus[0], refresh=True)
    assert len(counted) == 8
    assert again != first
    assert measure_device(cpus[0]) == again


@pytest.mark.parametrize(("own_s", "busy"), [(0.79, True), (0.81, False)])
def test_figures_of_a_busy_cpu_are_used_but_not_remembered(
    cache: Path, cpus: list[Device], counted: list[str], monkeypatch: pytest.MonkeyPatch, own_s: float, busy: bool
) -> None:
    monkeypatch.setattr(speed, "perf_counter", lambda: float(len(counted)))  # a second for each figure
    monkeypatch.setattr(speed, "thread_time", lambda: own_s * len(counted))
    first, link = measure_device(cpus[0]), measure_link(cpus[0], cpus[1])
    assert (first.busy, link.busy) == (busy, busy)
    assert min(first.fp32, link.bytes_per_s) > 1e9
    assert len(list(cache.glob("*"))) == (0 if busy else 2)
    assert (measure_device(cpus[0]) != first) == busy
    lines = "\n".join(device_lines("cpu,cpu", None))
    assert lines.count("busy: not remembered") == (4 if busy else 0)  # two devices, two links


def test_a_busy_cpu_leaves_what_is_remembered(
    cache: Path, cpus: list[Device], counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure_device(cpus[0])
    monkeypatch.setattr(speed, "thread_time", lambda: 0.0)
    assert measure_device(cpus[0], refresh=True).busy
    assert measure_device(cpus[0]) == first


@pytest.mark.parametrize("pair", [("cpu", "cuda:1"), ("cuda:1", "cpu"), ("cuda:0", "cuda:1")])
def test_page_locked_memory_makes_no_context_on_another_gpu(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process without any, it made one of hundreds of megabytes on cuda:0, the thread's own."""
    current, seen = ["cuda:0"], list[tuple[str, bool]]()

    @contextlib.contextmanager
    def on(device: object) -> Iterator[None]:
        current.append(str(device))
        yield
        current.pop()

    def ones(size: int, *, device: object, pin_memory: bool, dtype: torch.dtype) -> Any:
        seen.append((current[-1], pin_memory))
        return SimpleNamespace(copy_=lambda source: None)

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "ones", ones)
    assert speed._link_bandwidth(torch.device(pair[0]), torch.device(pair[1]), True) > 0
    assert {device for device, _ in seen} == {"cuda:1"}
    assert sum(pinned for _, pinned in seen) == ("cpu" in pair)


def test_a_thread_that_waits_for_a_gpu_is_not_busy(
    cache: Path, cpus: list[Device], counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "identity", lambda device: {"name": device.name})
    monkeypatch.setattr(speed, "thread_time", lambda: 0.0)
    gpu = dataclasses.replace(cpus[1], name="cuda:0", torch_device=torch.device("cuda:0"), cores=())
    assert not measure_link(cpus[0], gpu).busy
    assert not measure_link(gpu, cpus[0]).busy
    assert not measure_device(gpu).busy


@pytest.mark.parametrize(
    "change",
    [
        lambda m, d: dataclasses.replace(d, cores=(*d.cores, 99)),
        lambda m, d: dataclasses.replace(d, threads=d.threads + 1),
        lambda m, d: m.setattr(speed, "cpu_model", lambda: "another CPU") or d,
        lambda m, d: m.setattr(speed, "_versions", lambda: {"torch": "9.9"}) or d,
        lambda m, d: m.setattr(speed, "linear_identity", lambda: ["another kernel"]) or d,
    ],
    ids=["cores", "threads", "cpu", "versions", "kernel"],
)
def test_other_hardware_versions_or_kernels_are_measured_again(
    cache: Path, cpus: list[Device], counted: list[str], monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    # Not really pinned: cores that are not there cannot be.
    monkeypatch.setattr(speed, "call_pinned", lambda device, function: function())
    first = measure_device(cpus[0])
    assert measure_device(change(monkeypatch, cpus[0])) != first
    assert len(list(cache.iterdir())) == 2


def test_each_direction_of_a_link_is_its_own(cache: Path, cpus: list[Device], counted: list[str]) -> None:
    assert measure_link(cpus[0], cpus[1]) == measure_link(cpus[0], cpus[1])
    measure_link(cpus[1], cpus[0])
    assert counted == ["link"] * (2 if cpus[0].cores != cpus[1].cores else 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: "",
        lambda entry: '{"key": ',
        lambda entry: "\x00\xff",
        lambda entry: "[]",
        lambda entry: "7",
        lambda entry: json.dumps(entry | {"key": {}}),
        lambda entry: json.dumps(entry | {"values": {}}),
        lambda entry: json.dumps(entry | {"values": dict.fromkeys(entry["values"], "fast")}),
        lambda entry: json.dumps(entry | {"values": dict.fromkeys(entry["values"], float("nan"))}),
        lambda entry: json.dumps(entry | {"values": dict.fromkeys(entry["values"], -1.0)}),
    ],
)
def test_a_damaged_entry_is_measured_again_and_mended(
    cache: Path, cpus: list[Device], counted: list[str], damage: Callable[[Any], str]
) -> None:
    measure_device(cpus[0])
    (path,) = cache.iterdir()
    path.write_text(damage(json.loads(path.read_text())))
    second = measure_device(cpus[0])
    assert len(counted) == 8
    assert measure_device(cpus[0]) == second
    assert len(counted) == 8
    assert len(list(cache.iterdir())) == 1


def test_without_a_place_for_the_cache_speeds_are_still_measured(
    tmp_path: Path, cpus: list[Device], counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SPU_CACHE", str(tmp_path / "file" / "cache"))
    measure_device(cpus[0])
    measure_device(cpus[0])
    assert len(counted) == 8
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_no_litter(cache: Path, cpus: list[Device], counted: list[str], monkeypatch: Any) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(speed.os, "replace", refuse)
    measure_device(cpus[0])
    assert list(cache.iterdir()) == []


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPU_CACHE", "/fast/cache")
    assert cache_directory() == Path("/fast/cache")
    monkeypatch.delenv("SPU_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/me/.caches")
    assert cache_directory() == Path("/home/me/.caches/spu")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "spu"


def test_a_dtype_that_a_device_cannot_do_has_speed_zero() -> None:
    def refuse(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not implemented for 'Half'")

    assert speed._flops(refuse, torch.device("cpu"), torch.float16) == 0.0


def test_a_slow_product_is_measured_at_the_small_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[int] = []

    def slow(linear: Any, side: int, device: torch.device, dtype: torch.dtype, budget_s: float) -> float:
        sides.append(side)
        return 0.1

    monkeypatch.setattr(speed, "_linear_seconds", slow)
    assert speed._flops(torch.nn.functional.linear, torch.device("cpu"), torch.float16) == 2 * 128**3 / 0.1
    assert sides == [128, 128]


def test_torchs_linear_layer_stands_in_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import spu.ops

    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("no backend")

    monkeypatch.setattr(spu.ops, "linear_act", broken)
    assert speed._linear() is torch.nn.functional.linear
