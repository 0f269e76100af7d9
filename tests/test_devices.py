"""Devices: sizes, names, core sets, budgets. Other machines are played by patching what the host's would be."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spu.devices import host as hostinfo
from spu.devices import manager as devices
from spu.devices.manager import Device, DeviceManager, parse_bytes
from spu.devices.pin import call_pinned, pin_current_thread

GB = 10**9


def play_cpu(
    monkeypatch: pytest.MonkeyPatch, cores: int | Iterable[int], total: int = 32 * GB, free: int = 20 * GB
) -> None:
    """A machine with these cores, this memory and no GPU."""
    numbers = set(range(cores)) if isinstance(cores, int) else set(cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: numbers, raising=False)
    monkeypatch.setattr(hostinfo, "_physical_core", lambda core: (0, core))
    monkeypatch.setattr(hostinfo, "_cgroup_dirs", lambda controller: [])
    monkeypatch.setattr(devices, "host_memory", lambda: (total, free))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def play_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: tuple[str, int, int]) -> None:
    """Add GPUs: (model, total bytes, free bytes)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name=gpus[i][0], total_memory=gpus[i][1])
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (gpus[i][2], gpus[i][1]))


# Sizes.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GB", 8 * GB),
        ("8gb", 8 * GB),
        (" 8  GiB ", 8 * 2**30),
        ("7.5GB", 7_500_000_000),
        (".5kB", 500),
        ("1.KiB", 1024),
        ("512 mb", 512 * 10**6),
        ("3TiB", 3 * 2**40),
        ("2PB", 2 * 10**15),
        ("17B", 17),
        ("0GB", 0),
        ("0.1GB", 100_000_000),
        (12345, 12345),
    ],
)
def test_parse_bytes_reads_every_unit_in_any_case(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


def test_parse_bytes_takes_a_share_of_a_total() -> None:
    assert parse_bytes("80%", total=1000) == 800
    assert parse_bytes(" 12.5 % ", total=8 * GB) == GB
    with pytest.raises(ValueError, match=r"'80%'.*total"):
        parse_bytes("80%")


@pytest.mark.parametrize(
    "text", ["", "8", "GB", "8 G", "8 gigs", "-8GB", "8,5GB", "1e3GB", "8GBB", "8iB", "nan GB", "8 %GB"]
)
def test_parse_bytes_refuses_and_lists_the_valid_forms(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)
    assert "8GiB" in str(caught.value)


def test_parse_bytes_says_that_a_bare_number_lacks_its_unit() -> None:
    with pytest.raises(ValueError, match="no unit: 8GB"):
        parse_bytes("8")


@pytest.mark.parametrize("value", [8.5, None, True, [8]])
def test_parse_bytes_refuses_other_types(value: object) -> None:
    with pytest.raises(TypeError, match="8GiB"):
        parse_bytes(value)  # type: ignore[arg-type]


def test_parse_bytes_refuses_a_negative_number() -> None:
    with pytest.raises(ValueError, match="-5"):
        parse_bytes(-5)


# Names and cores.


def test_auto_without_a_gpu_is_the_cpu_in_two_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, 8)
    found = DeviceManager().get_devices()
    assert [(d.name, d.cores, d.threads) for d in found] == [("cpu:0", (0, 1, 2, 3), 4), ("cpu:1", (4, 5, 6, 7), 4)]
    assert all(d.torch_device == torch.device("cpu") for d in found)


def test_auto_with_one_core_is_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, [5])
    assert [(d.name, d.cores) for d in DeviceManager().get_devices("auto")] == [("cpu:0", (5,))]


def test_auto_with_gpus_is_all_of_them_and_one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, 4)
    play_gpus(monkeypatch, ("RTX 2070", 8 * GB, 7 * GB), ("RTX 4060", 8 * GB, 8 * GB))
    found = DeviceManager().get_devices()
    assert [d.name for d in found] == ["cuda:0", "cuda:1", "cpu:0"]
    assert [d.torch_device for d in found[:2]] == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert found[2].cores == (0, 1, 2)  # a quarter launches on the GPUs
    assert found[0].cores == ()
    assert "RTX 2070" in found[0].description


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("cpu", ["cpu:0"]),
        ("CPU", ["cpu:0"]),
        (["cpu", "cpu", "cpu"], ["cpu:0", "cpu:1", "cpu:2"]),
        ("cpu:0,cpu:1,cpu:2", ["cpu:0", "cpu:1", "cpu:2"]),
        (["cpu:1", "cpu"], ["cpu:1", "cpu:0"]),
        (("cpu, cpu", "cpu"), ["cpu:0", "cpu:1", "cpu:2"]),
        (torch.device("cpu"), ["cpu:0"]),
        ([torch.device("cpu"), "cpu:3"], ["cpu:0", "cpu:3"]),
        (["cuda:0", "cpu"], ["cuda:0", "cpu:0"]),
        (["cuda", "cuda"], ["cuda:0", "cuda:1"]),
        ("cpu,cuda:1", ["cpu:0", "cuda:1"]),
    ],
)
def test_specs(monkeypatch: pytest.MonkeyPatch, spec: object, names: list[str]) -> None:
    play_cpu(monkeypatch, 6)
    play_gpus(monkeypatch, ("A", 8 * GB, 7 * GB), ("B", 8 * GB, 8 * GB))
    found = DeviceManager().get_devices(spec)  # type: ignore[arg-type]
    assert [d.name for d in found] == names
    cores = [core for d in found for core in d.cores]
    given = 6 - any(n.startswith("cuda") for n in names)  # a quarter launches on the GPUs
    assert sorted(cores) == list(range(given)) * any(n.startswith("cpu") for n in names)


def test_a_ready_device_is_kept_and_its_cores_are_not_given_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, 4)
    manager = DeviceManager()
    mine = manager.get_devices("cpu,cpu")[0]
    found = manager.get_devices([mine, "cpu:1"])
    assert found[0] is mine
    assert set(found[1].cores) == {2, 3}


@pytest.mark.parametrize("bad", ["gpu", "cuda:0", "cpu:-1", "cpu:x", "cpu0", "cuda", "", "auto,cpu", "mps"])
def test_an_unknown_device_is_named_beside_what_there_is(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    play_cpu(monkeypatch, 2)
    with pytest.raises(ValueError, match=r"unknown device .*there is: cpu or cpu:0.*no CUDA device") as caught:
        DeviceManager().get_devices(bad)
    assert repr(bad.split(",")[0]) in str(caught.value)


def test_a_missing_gpu_is_refused_and_the_present_one_named(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, 2)
    play_gpus(monkeypatch, ("RTX 2070", 8 * GB, 7 * GB))
    with pytest.raises(ValueError, match=r"unknown device 'cuda:1'.*cuda:0 \(RTX 2070\)"):
        DeviceManager().get_devices("cuda:0,cuda:1")


def test_a_device_named_twice_an_empty_list_and_a_wrong_type_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, 2)
    with pytest.raises(ValueError, match="'cpu:0' is named twice"):
        DeviceManager().get_devices(["cpu:0", "cpu:0"])
    with pytest.raises(ValueError, match="no device was named"):
        DeviceManager().get_devices([])
    with pytest.raises(TypeError, match="device 3 is a int"):
        DeviceManager().get_devices([3])  # type: ignore[list-item]


@given(cores=st.sets(st.integers(0, 200), min_size=1, max_size=40), count=st.integers(1, 45))
def test_core_sets_are_disjoint_even_and_complete(cores: set[int], count: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        play_cpu(monkeypatch, cores)
        found = DeviceManager().get_devices(["cpu"] * count)
    given_out = [core for d in found for core in d.cores]
    assert set(given_out) <= cores
    if count <= len(cores):
        assert sorted(given_out) == sorted(cores)
        sizes = [len(d.cores) for d in found]
        assert max(sizes) - min(sizes) <= 1
        assert all(d.threads == len(d.cores) for d in found)
    else:
        assert all(len(d.cores) == 1 and d.threads == 1 for d in found)
        uses = [given_out.count(core) for core in cores]
        assert max(uses) - min(uses) <= 1


def test_hyperthreads_of_one_core_stay_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, 8)
    # The usual numbering: core k and core k + 4 are one physical core.
    monkeypatch.setattr(hostinfo, "_physical_core", lambda core: (0, core % 4))
    found = DeviceManager().get_devices()
    assert [d.cores for d in found] == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert [d.threads for d in found] == [2, 2]


def test_devices_have_as_many_fast_and_small_cores_as_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, 12)  # four fast cores of two hyperthreads each, then four small ones
    monkeypatch.setattr(hostinfo, "_physical_core", lambda core: (0, core // 2 if core < 8 else core))
    monkeypatch.setattr(hostinfo, "_numbers", lambda path: set(range(8, 12)))
    found = DeviceManager().get_devices("cpu,cpu")
    assert [d.cores for d in found] == [(0, 1, 2, 3, 8, 9), (4, 5, 6, 7, 10, 11)]
    assert [d.threads for d in found] == [4, 4]
    # Fewer of a kind than devices: in order.
    found = DeviceManager().get_devices(["cpu"] * 6)
    assert [d.cores for d in found] == [(2 * k, 2 * k + 1) for k in range(6)]


@pytest.mark.parametrize(("fast", "parts", "sizes"), [(4, 3, [2, 3, 3]), (3, 2, [3, 3]), (5, 3, [3, 3, 4])])
def test_devices_have_as_many_cores_as_each_other_where_no_kind_divides(
    monkeypatch: pytest.MonkeyPatch, fast: int, parts: int, sizes: list[int]
) -> None:
    play_cpu(monkeypatch, 2 * fast)
    monkeypatch.setattr(hostinfo, "_physical_core", lambda core: (0, core))
    monkeypatch.setattr(hostinfo, "_numbers", lambda path: set(range(fast, 2 * fast)))
    found = [d.cores for d in DeviceManager().get_devices(["cpu"] * parts)]
    assert sorted(map(len, found)) == sizes
    assert sorted(core for cores in found for core in cores) == list(range(2 * fast))


def test_a_cpu_quota_is_shared_in_proportion_to_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, 16)
    monkeypatch.setattr(devices, "effective_cores", lambda: 4)
    assert [d.threads for d in DeviceManager().get_devices("cpu,cpu")] == [2, 2]
    assert [d.threads for d in DeviceManager().get_devices("cpu")] == [4]


def test_without_affinity_all_cores_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, 2)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert [d.cores for d in DeviceManager().get_devices()] == [(0,), (1, 2)]


# Budgets.


def test_the_default_budget_is_available_memory_less_the_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, 2, total=30 * GB, free=20 * GB)
    whole = DeviceManager().get_devices("cpu")[0]
    assert (whole.memory_bytes, whole.budget_bytes) == (30 * GB, 17 * GB)
    assert "20.0 GB available less 3.00 GB" in whole.description
    halves = DeviceManager().get_devices("cpu,cpu")
    assert [d.budget_bytes for d in halves] == [17 * GB // 2] * 2


def test_the_reserve_never_takes_more_than_half_of_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, 2, total=64 * GB, free=2 * GB)
    play_gpus(monkeypatch, ("A", 24 * GB, 100 * 10**6))
    gpu, cpu = DeviceManager().get_devices()
    assert cpu.budget_bytes == GB
    assert gpu.budget_bytes == 50 * 10**6


def test_a_gpu_keeps_a_twentieth(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, 2)
    play_gpus(monkeypatch, ("A", 8 * GB, 7 * GB), ("B", 2 * GB, 2 * GB))
    first, second, _ = DeviceManager().get_devices()
    assert (first.memory_bytes, first.budget_bytes) == (8 * GB, 7 * GB - 400 * 10**6)
    assert second.budget_bytes == 2 * GB - (256 << 20)


def test_given_budgets_are_used_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, 4)
    play_gpus(monkeypatch, ("A", 8 * GB, 8 * GB))
    found = DeviceManager(" CUDA:0 = 6 GiB , cpu=24GB,").get_devices(["cuda:0", "cpu", "cpu"])
    assert [d.budget_bytes for d in found] == [6 << 30, 12 * GB, 12 * GB]
    assert DeviceManager({"cpu": "50%", "cuda:0": 123456}).get_devices()[0].budget_bytes == 123456
    assert DeviceManager("cpu=50%").get_devices("cpu")[0].budget_bytes == 16 * GB


def test_a_cpu_devices_own_budget_comes_out_of_the_shared_one(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, 4)
    found = DeviceManager("cpu=10GB,cpu:1=4GB").get_devices("cpu,cpu,cpu")
    assert [d.budget_bytes for d in found] == [3 * GB, 4 * GB, 3 * GB]
    assert sum(d.budget_bytes for d in found) == 10 * GB
    with pytest.raises(ValueError, match=r"cpu:1=10.0 GB leaves nothing of the cpu budget 10.0 GB for cpu:0"):
        DeviceManager("cpu=10GB,cpu:1=10GB").get_devices("cpu,cpu")


def test_a_budget_above_what_there_is_warns_and_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, 2, total=32 * GB)
    with pytest.warns(UserWarning, match=r"cpu=64GB is more than the 32.0 GB") as caught:
        manager = DeviceManager("cpu=64GB")
    assert caught[0].filename == __file__
    assert manager.get_devices("cpu")[0].budget_bytes == 64 * GB


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("cuda:0=8GB", r"unknown device 'cuda:0'; there is: cpu"),
        ("disk=8GB", r"unknown device 'disk'"),
        ("cpu=8", r"budget cpu=8: '8' is not a size \(no unit: 8GB\?\); valid: 8GB"),
        ("cpu=lots", r"budget cpu=lots: 'lots' is not a size"),
        ("cpu", r"'cpu' in budget 'cpu' is not DEVICE=SIZE"),
        ("=8GB", r"'=8GB' in budget"),
        ("cpu=", r"'cpu=' in budget"),
        ("cpu=0GB", r"budget cpu=0GB is zero"),
        ("cpu=8GB,CPU=9GB", r"budget CPU=9GB: cpu has one already, 8.00 GB"),
        ({"cpu": -1}, r"budget cpu=-1: size -1 is negative"),
    ],
)
def test_bad_budgets_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, budget: object, message: str) -> None:
    play_cpu(monkeypatch, 2)
    with pytest.raises(ValueError, match=message):
        DeviceManager(budget)  # type: ignore[arg-type]


def test_a_budget_for_a_cpu_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, 4)
    with pytest.raises(ValueError, match=r"unknown device 'cpu:2'; the CPU devices here are cpu:0, cpu:1"):
        DeviceManager("cpu:2=1GB").get_devices("cpu,cpu")


def test_a_budget_for_gpus_in_general_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cpu(monkeypatch, 4)
    play_gpus(monkeypatch, ("A", 8 * GB, 8 * GB))
    with pytest.raises(ValueError, match="cuda:0=8GB"):
        DeviceManager("cuda=8GB")


# Threads.


def test_a_pinned_call_has_the_devices_cores_and_threads_and_the_caller_keeps_its_own() -> None:
    before = torch.get_num_threads()
    for device in DeviceManager().get_devices("cpu,cpu"):
        name, threads, cores = call_pinned(
            device,
            lambda: (
                threading.current_thread().name,
                torch.get_num_threads(),
                os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(device.cores),  # noqa: B023
            ),
        )
        assert (name, threads, cores) == (f"spu-{device.name}", device.threads, set(device.cores))
    assert torch.get_num_threads() == before


def test_a_pinned_calls_exception_reaches_the_caller() -> None:
    def fail() -> None:
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        call_pinned(DeviceManager().get_devices("cpu")[0], fail)


def test_pinning_to_a_gpu_changes_nothing() -> None:
    before = torch.get_num_threads()
    pin_current_thread(Device("cuda:0", torch.device("cuda:0"), (), 1, GB, GB, "a GPU"))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("size", ["99999999999999TB", "1000000000000GiB", "2000PB", 10**19])
def test_a_budget_that_no_machine_has_is_refused(size: str | int) -> None:
    """It ended in an error of a C++ cast."""
    with pytest.raises(ValueError, match="is more memory than any machine has; valid: 8GB"):
        parse_bytes(size)
    with pytest.raises(ValueError, match="budget cpu=.*more memory than any machine has"):
        DeviceManager({"cpu": size})


def test_a_cpu_beyond_the_cores_is_unknown_unless_a_list_names_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spu.devices.manager.usable_cores", lambda: [0, 1])
    for spec in ("cpu:2", ["cpu:0", "cpu:2"], "cpu:100"):
        with pytest.raises(ValueError, match=r"unknown device 'cpu:\d+': the 2 cores make cpu:0 to cpu:1; there is: "):
            DeviceManager().get_devices(spec)
    assert [d.name for d in DeviceManager().get_devices(["cpu"] * 4)] == ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]


@pytest.mark.parametrize(("cores", "left"), [(16, 2), (6, 1), (2, 0)])
def test_cpu_devices_leave_cores_to_the_threads_that_launch_on_gpus(
    cores: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_cpu(monkeypatch, cores)
    assert [len(d.cores) for d in DeviceManager().get_devices("cpu")] == [cores]
    play_gpus(monkeypatch, ("RTX 2070", 8 * GB, 8 * GB))
    assert [len(d.cores) for d in DeviceManager().get_devices("cuda:0,cpu")] == [0, cores - left]
    assert [len(d.cores) for d in DeviceManager().get_devices("cpu")] == [cores]
