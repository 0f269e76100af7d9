"""Parts called by hand: gradients across a detach, at their true scale, and what is refused or warned about."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from pipelines import batch, devices, layers
from torch import nn

import spu
from spu import DeviceManager, LossScaler, ModelParallelTrainer
from spu.trainer import manual

pytestmark = pytest.mark.usefixtures("one_thread")


def run_by_hand(trainer: ModelParallelTrainer, x: torch.Tensor, *, detach: bool) -> torch.Tensor:
    for i, module in enumerate(trainer.modules()):
        if i and detach:
            x = x.detach().requires_grad_(True).to(module.device)
        else:
            x = x.to(module.device)
        x = module(x)
    return x


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("spec", ["auto", ["cpu:0", "cpu:1"], ["cpu"] * 4])
def test_the_idiom_gives_every_part_its_true_gradient(spec: object, detach: bool) -> None:
    parts = layers()
    plain = nn.Sequential(*copy.deepcopy(parts))
    trainer = ModelParallelTrainer(devices=DeviceManager().get_devices(spec))
    for part in parts:
        trainer.add_module(part)
    batches = [batch(seed=seed) for seed in range(3)]
    losses = [F.cross_entropy(run_by_hand(trainer, x, detach=detach), y) for x, y in batches]
    for loss in losses:  # all forwards first: each backward must find its own way
        loss.backward()
    for x, y in batches:
        F.cross_entropy(plain(x), y).backward()
    ours = [p for part in parts for p in part.parameters()]
    for mine, theirs in zip(ours, plain.parameters(), strict=True):
        assert_equal(mine.grad, theirs.grad)
    assert [id(p) for p in trainer.parameters()] == [id(p) for p in ours]
    trainer.close()


def test_parts_that_could_not_all_be_placed_are_placed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call handed out those that had been placed, and a loop ran without the others."""
    trainer, placed = ModelParallelTrainer([nn.Linear(4, 4), nn.Linear(4, 4)], devices(2)), list[nn.Module]()

    def move(module: nn.Module, device: torch.device) -> None:
        placed.append(module)
        if len(placed) == 2:
            raise MemoryError("no room")

    monkeypatch.setattr(manual, "move_module", move)
    with pytest.raises(MemoryError, match="no room"):
        trainer.modules()
    assert len(list(trainer.modules())) == 2


def test_the_bridge_carries_the_loss_scale() -> None:
    parts = layers()
    plain = nn.Sequential(*copy.deepcopy(parts))
    scaler = LossScaler(init_scale=2.0**10)
    trainer = ModelParallelTrainer(devices=["cpu:0", "cpu:1"])
    for part in parts:
        trainer.add_module(part)
    grads = spu.MainGrads(trainer.parameters())
    x, y = batch()
    scaler.scope("cpu")
    scaler.begin_step()
    grads.begin_step()
    scaler.scale(F.cross_entropy(run_by_hand(trainer, x, detach=True), y)).backward()
    F.cross_entropy(plain(x), y).backward()
    for mine, theirs in zip(trainer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-8)
    grads.close()


def test_a_manual_continuation_is_refused_by_name() -> None:
    trainer = ModelParallelTrainer(devices=["cpu:0", "cpu:1"])
    first, second = layers()[:2]
    trainer.add_module(first)
    trainer.add_module(second)
    one, two = trainer.modules()
    out = one(batch()[0])
    middle = out.detach().requires_grad_(True)
    two(middle).sum().backward()
    assert middle.grad is not None
    with pytest.raises(RuntimeError, match="bridge"):
        out.backward(middle.grad)


def test_a_clone_before_requires_grad_is_warned_about() -> None:
    trainer = ModelParallelTrainer(devices=["cpu:0", "cpu:1"])
    for part in layers()[:2]:
        trainer.add_module(part)
    one, two = trainer.modules()
    out = one(batch()[0])
    with pytest.warns(UserWarning, match="shares no storage"):
        two(out.detach().clone().requires_grad_(True))


def test_the_bridge_keeps_no_graph_that_nobody_can_continue() -> None:
    trainer = ModelParallelTrainer(devices=["cpu:0", "cpu:1"])
    for part in layers()[:2]:
        trainer.add_module(part)
    one, _ = trainer.modules()
    for _ in range(20):
        one(batch()[0])  # dropped at once
    assert len(one._bridge._pending) <= 2
