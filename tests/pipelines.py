"""For tests that hold a pipeline to the plain model: every schedule, the plain loop, and the comparison."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from torch import nn
from torch.utils import _pytree as pytree

import spu
from spu import DeviceManager, LayerRandomness, ModelParallelTrainer

WIDTH = 16  # of what is in the middle of a model
# schedule, devices, stages on each
SCHEDULES = [
    ("gpipe", 1, 1),
    ("gpipe", 3, 1),
    ("1f1b", 2, 1),
    ("interleaved", 2, 2),
    ("zb", 2, 1),
    ("zbv", 2, 2),
    ("layer_outer", 2, 2),
]

every_schedule = pytest.mark.parametrize(("schedule", "ranks", "virtual"), SCHEDULES)
SOME_SCHEDULES = [("gpipe", 3, 1), ("zbv", 2, 2)]
some_schedules = pytest.mark.parametrize(("schedule", "ranks", "virtual"), SOME_SCHEDULES)
with_and_without_recompute = pytest.mark.parametrize("recompute", [False, True])


def devices(count: int = 2) -> list[spu.Device]:
    """CPU devices with one thread each, as the plain run has."""
    return [dataclasses.replace(d, threads=1) for d in DeviceManager().get_devices(["cpu"] * count)]


def trainer(model: Any, ranks: int = 2, **settings: Any) -> ModelParallelTrainer:
    settings = {"precision": "fp32", "microbatches": 4} | settings
    return ModelParallelTrainer(model, devices(ranks), **settings)


def layers(seed: int = 0) -> list[nn.Module]:
    """A model in four parts, for `batch`."""
    torch.manual_seed(seed)
    return [nn.Linear(6, 16), nn.Sequential(nn.GELU(), nn.Linear(16, 16)), nn.Tanh(), nn.Linear(16, 4)]


def model_of(*middle: nn.Module) -> nn.Sequential:
    """A model of :func:`batch`, with these layers of ``WIDTH`` in the middle."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, WIDTH), *middle, nn.Linear(WIDTH, 4))


def mlp(*middle: nn.Module) -> nn.Sequential:
    """The same with a tanh, where nothing else is given."""
    return model_of(*(middle or (nn.Tanh(),)))


def batch(rows: int = 8, width: int = 6, classes: int = 4, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator), torch.randint(classes, (rows,), generator=generator)


def plain_pass(
    model: nn.Sequential, x: Any, y: torch.Tensor, parts: int, loss_fn: Callable[..., torch.Tensor], step: int = 0
) -> torch.Tensor:
    """Forward and backward of every microbatch in turn, each layer in its own randomness; the mean loss."""
    total = torch.zeros(())
    columns, spec = pytree.tree_flatten(x)
    split = [leaf.clone().tensor_split(parts) for leaf in columns]
    for index, part_y in enumerate(y.tensor_split(parts)):
        hidden = pytree.tree_unflatten([pieces[index].clone() for pieces in split], spec)
        for name, layer in model._modules.items():
            with LayerRandomness(0, step, index, name):
                hidden = layer(hidden)
        with LayerRandomness(0, step, index, "(loss)"):
            share = loss_fn(hidden, part_y) * torch.tensor(len(part_y) / len(y), dtype=torch.float64).float()
        share.backward()
        total += share.detach()
    return total


def assert_equals_plain(
    model: nn.Sequential,
    x: Any,
    y: torch.Tensor,
    *,
    ranks: int = 2,
    passes: int = 1,
    loss_fn: Callable[..., torch.Tensor] = F.cross_entropy,
    same_order: bool = True,
    **settings: Any,
) -> None:
    """Losses, gradients and buffers are the plain model's, bit for bit, in each pass.

    Without ``same_order`` gradients may be sums in another order.
    """
    plain = copy.deepcopy(model)
    settings = {"microbatches": 4} | settings
    with trainer(model, ranks, loss_fn=loss_fn, **settings) as t:
        for step in range(passes):
            loss, _ = t.forward_backward(pytree.tree_map(torch.clone, x), y)
            plain.zero_grad()
            expected = plain_pass(plain, x, y, settings["microbatches"], loss_fn, step)
            assert_equal(loss, expected, f"loss of pass {step}")
            for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
                assert (ours.grad is None) == (theirs.grad is None), name
                if theirs.grad is not None and not same_order:
                    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
                elif theirs.grad is not None:
                    assert_equal(ours.grad, theirs.grad, f"{name}, pass {step}")
            for (name, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
                assert_equal(ours, theirs, f"{name}, pass {step}")
