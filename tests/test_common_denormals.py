"""What threads make of denormal numbers: flushed or not, and carried from the caller to a trainer's workers."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn

from spu import DeviceManager, ModelParallelTrainer
from spu.common.denormals import call_as, flushes_denormals


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)


def test_the_mode_of_the_calling_thread_is_told() -> None:
    tiny = torch.tensor([1], dtype=torch.int32).view(torch.float32)
    for flushes in (True, False, True):
        torch.set_flush_denormal(flushes)
        assert flushes_denormals() == flushes
        assert bool((tiny * 1.0).view(torch.int32)) != flushes


def test_a_call_has_the_mode_that_it_is_given() -> None:
    seen: list[bool] = []
    thread = threading.Thread(target=call_as, args=(True, lambda: seen.append(flushes_denormals())))
    thread.start()
    thread.join()
    assert seen == [True]
    assert not flushes_denormals()
    assert call_as(False, lambda a, b: (a, b), 1, b=2) == (1, 2)


def test_workers_follow_a_mode_that_is_set_between_steps() -> None:
    """The second moments of these gradients are denormal numbers, and eps does not hide them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    plain = copy.deepcopy(model)
    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    devices = [dataclasses.replace(device, threads=1) for device in DeviceManager().get_devices(["cpu", "cpu"])]
    make = partial(torch.optim.AdamW, lr=0.5, eps=1e-30, foreach=False)

    def tiny_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets) * 1e-18

    optimizer = make(plain.parameters())
    with ModelParallelTrainer(
        model, devices, precision="fp32", microbatches=1, loss_fn=tiny_loss, optimizer=make
    ) as trainer:
        for flushes in (False, True, False):
            torch.set_flush_denormal(flushes)
            trainer.step(x, y)
            tiny_loss(plain(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                assert torch.equal(ours, theirs)
