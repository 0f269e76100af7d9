"""Models that are no decoders, as people have them: their losses and weights are plain torch's, over two stages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pipelines import devices
from torch import nn

from spu import ModelParallelTrainer

pytestmark = pytest.mark.usefixtures("reference")

IDS = torch.randint(1, 64, (4, 10), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(10) < torch.tensor([[10], [7], [10], [4]])).long()
PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
CLASSES = torch.tensor([0, 2, 1, 2])
PLACES = torch.randint(3, (4, 16, 16), generator=torch.Generator().manual_seed(2))


class Residual(nn.Module):
    """Convolutions with batch norm, whose statistics are those of each microbatch in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + F.relu(self.inner_norm(self.inner(x)))
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """What the way down has found is used again on the way up: it crosses the stages between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down, self.lowest = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.up, self.top = nn.ConvTranspose2d(16, 16, 2, stride=2), nn.ConvTranspose2d(32, 8, 2, stride=2)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.relu(self.stem(x))
        b = F.relu(self.down(a))
        x = F.relu(self.up(F.relu(self.lowest(b))))
        x = F.relu(self.top(torch.cat([x, b], 1)))
        return self.head(torch.cat([x, a], 1))


def of_transformers(name: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    config = getattr(transformers, f"{name.partition('For')[0]}Config")(**sizes, **still, **settings)
    return getattr(transformers, name)(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, torch.Tensor]] = {
    "text": (partial(of_transformers, "BertForSequenceClassification", vocab_size=64), {"input_ids": IDS}, CLASSES),
    "text with a mask": (
        partial(of_transformers, "BertForSequenceClassification", vocab_size=64),
        {"input_ids": IDS, "attention_mask": MASK},
        CLASSES,
    ),
    "pictures": (
        partial(of_transformers, "ViTForImageClassification", image_size=16, patch_size=8),
        {"pixel_values": PIXELS},
        CLASSES,
    ),
    "batch norm": (Residual, PIXELS, CLASSES),
    "u-net": (UNet, PIXELS, PLACES),
}


def loss_fn(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs["logits"] if isinstance(outputs, dict) else outputs, targets)


def halves(batch: Any) -> list[Any]:
    if isinstance(batch, dict):
        return [{key: value.tensor_split(2)[k] for key, value in batch.items()} for k in range(2)]
    return list(batch.tensor_split(2))


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_as_in_plain_torch(name: str) -> None:
    make, inputs, targets = MODELS[name]
    torch.manual_seed(0)
    model = make().train()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    keys: dict[str, Any] = {"precision": "fp32", "microbatches": 2, "optimizer": torch.optim.AdamW, "lr": 0.01}
    with ModelParallelTrainer(model, devices(2), loss_fn=loss_fn, **keys) as trainer:
        for _ in range(2):
            total = torch.zeros(())
            for x, y in zip(halves(inputs), halves(targets), strict=True):
                share = loss_fn(plain(**x) if isinstance(x, dict) else plain(x), y) * 0.5
                share.backward()
                total += share.detach()
            optimizer.step()
            optimizer.zero_grad()
            batch = {**inputs, "labels": targets} if isinstance(inputs, dict) else (inputs, targets)
            result = trainer.step(batch) if isinstance(batch, dict) else trainer.step(*batch)
            assert result.loss == total.item()
        state = trainer.state_dict_for_model()
    for key, value in plain.state_dict().items():
        assert torch.equal(state[key], value), key
