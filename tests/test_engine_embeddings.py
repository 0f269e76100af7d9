"""Embeddings that depend on which rows they see at a time: exact in one microbatch, refused in several."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pipelines import devices
from torch import nn

from spu import ModelParallelTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(2))


def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def model(tied: bool, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Embedding(20, 16, **options), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 20, bias=False))
    if tied:
        layers[3].weight = layers[0].weight
    return layers


CASES = [
    (False, {"scale_grad_by_freq": True}, "'0' has scale_grad_by_freq"),
    (True, {"max_norm": 2.0}, "'0' has max_norm, and '3' uses its weight"),
]


@pytest.mark.parametrize(("tied", "options", "said"), CASES)
@pytest.mark.parametrize("cut", [{"microbatches": 2}, {"microbatches": 1, "accumulate": 2}])
def test_what_microbatches_cannot_do_exactly_is_refused(
    tied: bool, options: dict[str, Any], said: str, cut: dict[str, int]
) -> None:
    with (
        ModelParallelTrainer(model(tied, **options), devices(2), loss_fn=loss_fn, **cut) as trainer,
        pytest.raises(ValueError, match=said),
    ):
        trainer.step(IDS, TARGETS)


@pytest.mark.parametrize(
    ("tied", "options", "microbatches"), [(*case[:2], 1) for case in CASES] + [(False, {"max_norm": 2.0}, 4)]
)
def test_what_is_exact_is_the_plain_models(tied: bool, options: dict[str, Any], microbatches: int) -> None:
    trained = model(tied, **options)
    plain = copy.deepcopy(trained)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    keywords: dict[str, Any] = {"optimizer": torch.optim.SGD, "lr": 0.5, "max_grad_norm": None, "precision": "fp32"}
    with ModelParallelTrainer(
        trained, devices(2), loss_fn=loss_fn, transfer="none", microbatches=microbatches, **keywords
    ) as trainer:
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_fn(plain(IDS), TARGETS)
            loss.backward()
            optimizer.step()
            assert trainer.step(IDS, TARGETS).loss == pytest.approx(loss.item(), rel=1e-6)
    for (name, ours), theirs in zip(trained.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_a_frozen_embedding_counts_nothing() -> None:
    layers = model(False, scale_grad_by_freq=True)
    layers[0].requires_grad_(False)
    with ModelParallelTrainer(layers, devices(2), loss_fn=loss_fn, microbatches=2) as trainer:
        trainer.step(IDS, TARGETS)
