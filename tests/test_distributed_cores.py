"""Processes of one machine share its cores, unless somebody has chosen their threads."""

from __future__ import annotations

import os
import platform
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import in_ranks

from spu import ModelParallelTrainer
from spu.devices import host
from spu.devices.host import physical_cores, usable_cores
from spu.devices.manager import Device, DeviceManager
from spu.distributed import cores
from spu.distributed.job import Job

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

needs_two = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(usable_cores()) < 2, reason="needs two cores and affinities"
)


@pytest.mark.parametrize(
    ("environment", "count", "chosen"),
    [
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 1, False),  # torchrun's own
        ({"OMP_NUM_THREADS": "1"}, 1, True),
        ({"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "none"}, 3, True),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 3, True),  # torch.set_num_threads(3)
        ({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 1, True),
        ({}, None, False),
        ({"MKL_NUM_THREADS": "2"}, None, True),
    ],
)
def test_who_has_chosen_the_threads(monkeypatch, environment, count, chosen):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(count or len(usable_cores()))
    assert cores.threads_are_chosen() is chosen


def test_a_number_of_threads_that_is_not_that_of_the_cores_is_chosen(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    own = usable_cores()
    torch.set_num_threads(len(own) + 3)
    assert cores.threads_are_chosen()
    torch.set_num_threads(physical_cores(own))
    assert not cores.threads_are_chosen()


def test_turns_are_those_of_processes_with_the_same_cores_of_one_machine():
    a, bound, b, chosen = ("a", (0, 1, 2, 3)), ("a", (2, 3)), ("b", (0, 1, 2, 3)), ("a", ())
    everyones = [a, b, a, bound, chosen, a, bound]
    assert [cores.my_turn(everyones, rank) for rank in range(6)] == [(0, 3), (0, 1), (1, 3), (0, 2), (0, 1), (2, 3)]


def shares(chosen: bool, devices: object) -> list[object]:
    """Return this process's cores and threads: before a job, what it says, in it and after it."""
    os.environ.pop("MKL_NUM_THREADS", None)
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}
    torch.set_num_threads(len(usable_cores()) + 2 if chosen else 1)

    def seen() -> list[object]:
        return [sorted(os.sched_getaffinity(0)), torch.get_num_threads()]

    before, job = seen(), Job(devices)
    found = [sorted(job.device.cores), job.device.threads, [device.threads for device in job.devices]]
    inside = seen()
    job.close()
    job.close()
    return [before, found, inside, seen(), job.device.description]


@needs_two
@pytest.mark.parametrize("devices", ["auto", "cpu"])
def test_each_of_two_processes_is_bound_to_its_half_of_the_cores_and_given_back_what_it_had(devices):
    halves = DeviceManager().get_devices(["cpu", "cpu"])
    for half, (before, found, inside, after, text) in zip(halves, in_ranks(2, shares, False, devices), strict=True):
        assert found == [list(half.cores), half.threads, [other.threads for other in halves]]
        assert inside == [list(half.cores), half.threads]
        assert after == before
        assert text.partition("; ")[0] == half.description.partition("; ")[0]


@needs_two
def test_what_was_given_back_is_left_alone():
    torch.set_num_threads(2)
    before = os.sched_getaffinity(0)
    share = cores.Share(DeviceManager().get_devices("cpu,cpu")[0], alone=True)
    share.give_back()
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (2, before)
    torch.set_num_threads(share.threads)  # which somebody wants now
    share.give_back()
    assert torch.get_num_threads() == share.threads


def forsaken() -> list[object]:
    """Return this process's cores and threads: before a job, and after one whose other process ended meanwhile."""
    os.environ.pop("MKL_NUM_THREADS", None)
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}
    torch.set_num_threads(1)
    before, share, seen = [sorted(os.sched_getaffinity(0)), 1], cores.Share.__init__, []

    def last(self: cores.Share, device: Device, **how: Any) -> None:
        share(self, device, **how)
        seen.append(sorted(os.sched_getaffinity(0)))
        if dist.get_rank() == 1:
            raise KeyboardInterrupt

    cores.Share.__init__ = last  # type: ignore[method-assign]
    try:
        Job("cpu")
    except KeyboardInterrupt:
        dist.destroy_process_group()
        return []
    except ConnectionError:
        return [before, seen, [sorted(os.sched_getaffinity(0)), torch.get_num_threads()]]
    raise AssertionError("the job was made")


@needs_two
def test_a_job_that_could_not_be_made_leaves_no_cores_bound():
    before, inside, after = in_ranks(2, forsaken)[0]
    assert inside != [before[0]]
    assert after == before


def refused() -> list[object]:
    """Return this process's cores and threads: before a trainer, and after one that was refused."""
    os.environ.pop("MKL_NUM_THREADS", None)
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}
    torch.set_num_threads(1)
    before = [sorted(os.sched_getaffinity(0)), torch.get_num_threads()]
    for wrong in ({"tiers": "nonsense=3"}, {"tiers": f"disk={__file__}:1GB"}, {"loss_weight": "nonsense"}):
        with pytest.raises(ValueError, match=r"nonsense|is a file"):
            ModelParallelTrainer([torch.nn.Linear(2, 2)] * 2, engine="distributed", **wrong)
    return [before, [sorted(os.sched_getaffinity(0)), torch.get_num_threads()]]


@needs_two
def test_a_refused_trainer_leaves_no_cores_bound():
    for before, after in in_ranks(2, refused):
        assert after == before


def test_machines_of_one_name_share_no_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(cores, "threads_are_chosen", lambda: False)
    monkeypatch.setattr(platform, "node", lambda: "localhost")
    device, everyones = DeviceManager().get_devices("cpu")[0], []
    for name in ("one", "another"):
        boot = tmp_path / name / "sys/kernel/random/boot_id"
        boot.parent.mkdir(parents=True)
        boot.write_text(f"{name}\n")
        monkeypatch.setattr(host, "_PROC", tmp_path / name)
        everyones.append(cores.where(device))
    assert [cores.my_turn(everyones, rank) for rank in range(2)] == [(0, 1), (0, 1)]


@needs_two
def test_threads_that_were_chosen_stay_and_so_do_the_cores():
    for before, found, inside, after, _ in in_ranks(2, shares, True, "auto"):
        assert found == [[], before[1], [before[1]] * 2]
        assert before == inside == after


@needs_two
def test_more_processes_than_cores_have_one_thread_each_and_are_not_bound():
    count = len(usable_cores()) + 1
    if count > 4:
        pytest.skip("would start many processes")
    for before, found, inside, after, _ in in_ranks(count, shares, False, "auto"):
        assert found == [[], 1, [1] * count]
        assert inside == [before[0], 1]
        assert after == before
