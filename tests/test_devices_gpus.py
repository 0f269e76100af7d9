"""The memory of GPUs: whose is asked for, and what of it is free."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_devices import GB, play_cpu, play_gpus

from spu.devices.manager import DeviceManager


def test_only_a_gpu_that_is_used_is_asked_for_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking makes a context there: each process of a job took hundreds of megabytes of all GPUs of its machine."""
    play_cpu(monkeypatch, 4)
    play_gpus(monkeypatch, ("A", 8 * GB, 8 * GB), ("B", 8 * GB, 6 * GB))
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: asked.append(i) or (6 * GB, 8 * GB))
    manager = DeviceManager()
    assert "cuda:1 (B)" in manager.known()
    assert asked == []
    (device,) = manager.get_devices("cuda:1")
    assert asked == [1]
    assert device.budget_bytes == 6 * GB - 8 * GB // 20


def test_what_torch_keeps_of_tensors_that_are_gone_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second trainer in a notebook got the budget that the first one had left."""
    play_cpu(monkeypatch, 4)
    play_gpus(monkeypatch, ("A", 8 * GB, 2 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda i: 5 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda i: 1 * GB)
    (device,) = DeviceManager().get_devices("cuda:0")
    assert device.budget_bytes == 6 * GB - 8 * GB // 20


_RESERVE = 8_300_000_000 // 20


@pytest.mark.parametrize(
    ("free", "ours", "said"),
    [
        (7 * GB, 0, "is more than the 7.00 GB that are free: the driver and other programs have the rest, so a plan "
                    "may not fit. Without a budget it is what is free, less a reserve"),
        (6 * GB, 2 * GB, "leaves 0 B of the 8.00 GB that are free to what no plan counts, torch's fragments and the "
                         "workspaces and kernels of libraries, so a plan may not fit. Without a budget 415 MB are kept "
                         "for it"),
        (8 * GB + _RESERVE - 1, 0, "leaves 415 MB of the 8.41 GB"),
        (8 * GB + _RESERVE, 0, None),
    ],
)  # fmt: skip
def test_a_budget_beyond_what_is_free_is_warned_of(
    free: int, ours: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card of 8 GB has not 8 GB for tensors: the driver's context is there too, the allocator's fragments, workspaces
    of cuBLAS for each thread, and perhaps a desktop.
    """
    play_cpu(monkeypatch, 4)
    play_gpus(monkeypatch, ("A", 8_300_000_000, free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda i: ours)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda i: ours)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        (device,) = DeviceManager("cuda:0=8GB").get_devices("cuda:0")
    assert device.budget_bytes == 8 * GB
    texts = [str(each.message) for each in found if "free" in str(each.message)]
    assert len(texts) == (said is not None)
    assert said is None or texts[0].startswith(f"budget cuda:0=8.00 GB {said}")
