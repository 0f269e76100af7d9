"""Gradients of parameters that are viewed and added, or concatenated: torch has others' values in their memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pipelines import devices
from torch import Tensor, nn

from spu import LossScaler, MainGrads, ModelParallelTrainer
from spu.engine.apart import part_gradients
from spu.ops import linear_act


class Viewed(nn.Module):
    """A linear layer whose weight is the sum of two viewed parameters, and its bias viewed; or without views."""

    def __init__(self, *, views: bool) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(64) * 0.3) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(8))
        self.views = views

    def forward(self, x: Tensor) -> Tensor:
        if not self.views:
            return F.linear(x, (self.a + self.b).view(8, 8)) + self.bias
        return F.linear(x, self.a.view(8, 8) + self.b.view(8, 8)) + self.bias.view(1, 8)


def model_of(*, views: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Viewed(views=views), nn.Tanh(), Viewed(views=views), nn.Tanh(), Viewed(views=views))


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb", "zbv"])
@pytest.mark.parametrize("microbatches", [2, 8])
@pytest.mark.parametrize("recompute", [False, True])
def test_microbatches_add_up(schedule: str, microbatches: int, recompute: bool) -> None:
    """The second microbatch counted twice; in a V with one row each, what it added went into a message as well."""
    x, y = torch.randn(8, 8), torch.randn(8, 8)
    plain, model = model_of(views=False), model_of(views=True)
    F.mse_loss(plain(x), y).backward()
    settings: dict[str, Any] = {"schedule": schedule, "recompute": recompute, "microbatches": microbatches}
    with ModelParallelTrainer(model, devices(2), precision="fp32", loss_fn=loss_of, **settings) as trainer:
        trainer.forward_backward(x, y)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def parameter_with(gradient: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(gradient.shape))
    parameter.grad = gradient
    return parameter


def test_only_what_overlaps_moves() -> None:
    memory = torch.arange(8.0)
    apart = [parameter_with(memory[:4]), parameter_with(memory[4:])]
    before = [parameter.grad for parameter in apart]
    part_gradients(apart)
    assert all(parameter.grad is gradient for parameter, gradient in zip(apart, before, strict=True))

    first, inside = parameter_with(memory[:8]), parameter_with(memory[4:8])
    part_gradients([inside, first])
    for parameter in (first, inside):
        assert parameter.grad is not None
        parameter.grad.add_(1)
    torch.testing.assert_close(inside.grad, torch.arange(5.0, 9.0))
    torch.testing.assert_close(first.grad, torch.arange(1.0, 9.0))


@pytest.mark.parametrize("start", [0, 6])
def test_what_is_held_stays(start: int) -> None:
    memory = torch.arange(12.0)
    held, parameter = memory[start : start + 6], parameter_with(memory[2:10])
    part_gradients([parameter, parameter_with(torch.zeros(0))], [None, held])
    assert parameter.grad is not None
    parameter.grad.zero_()
    assert torch.equal(memory, torch.arange(12.0))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_sparse_gradient_is_refused_by_name(precision: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 2))
    with (
        ModelParallelTrainer(model, "cpu", precision=precision, microbatches=2) as trainer,
        pytest.raises(Exception, match=r"layout torch.sparse_coo.*sparse=False"),
    ):
        trainer.step(torch.tensor([[1, 2]] * 4), torch.tensor([0, 1, 1, 0]))


def test_what_others_would_keep_alive_is_left() -> None:
    """Two gradients fill their memory together and stay; of two that do not, each has its own."""
    full, rest = torch.arange(8.0), torch.arange(9.0)
    parameters = [parameter_with(part) for part in (full[:4], full[4:], rest[:4], rest[5:])]
    part_gradients(parameters)
    gradients = [parameter.grad for parameter in parameters]
    assert [None if g is None else g.untyped_storage().nbytes() for g in gradients] == [32, 32, 16, 16]
    assert torch.equal(torch.cat([g for g in gradients if g is not None]), torch.cat([full, rest[:4], rest[5:]]))


class Prompted(nn.Module):
    """A layer with a learnt row before those that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.layer = nn.Parameter(torch.randn(1, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(torch.cat([self.prompt, x]))
        return (h + h[:1])[1:].tanh()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_prompt_does_not_keep_the_gradient_of_the_data(recompute: bool) -> None:
    """It did, in each layer, from a microbatch's backward to the end of the step (concatenated_gradient_memory.sh)."""
    torch.manual_seed(0)
    plain = nn.Sequential(*[Prompted() for _ in range(4)])
    model = copy.deepcopy(plain)
    x, y = torch.randn(64, 8), torch.randn(64, 8)
    F.mse_loss(torch.cat([plain(part) for part in x.chunk(4)]), y).backward()
    settings: dict[str, Any] = {"precision": "fp32", "loss_fn": loss_of, "microbatches": 4, "recompute": recompute}
    with ModelParallelTrainer(model, devices(2), **settings) as trainer:
        trainer.forward_backward(x, y)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert ours.grad.untyped_storage().nbytes() == ours.nbytes
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gradient_stays_in_memory_that_was_lent(dtype: torch.dtype) -> None:
    """A streamed stage's slot: a clone would take as much memory again."""
    parameters = [nn.Parameter(torch.randn(4, 4).to(dtype)) for _ in range(2)]
    slot = torch.zeros(100)
    with MainGrads(parameters) as grads:
        grads.begin_step()
        grads.lend({id(parameters[0]): slot[:16].view(4, 4)})
        product = linear_act(torch.randn(3, 4).to(dtype), parameters[0])
        LossScaler(enabled=False).scale(
            product.float().sum() + (parameters[0] * parameters[1]).float().sum()
        ).backward()
        wanted = [parameter.grad for parameter in parameters]
        part_gradients(parameters)
        assert [p.grad is g for p, g in zip(parameters, wanted, strict=True)] == [True, True]
        assert parameters[0].grad is not None
        assert parameters[0].grad.data_ptr() == slot.data_ptr()
