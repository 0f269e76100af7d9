"""The reference: plain PyTorch, whose batches are not cut more than their size asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from spu.train import plain
from spu.train.config import TrainConfig


class Words(nn.Module):
    """A decoder of one table, with the keywords of transformers' models; notes the rows of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 16)
        self.rows: list[int] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        self.rows.append(len(input_ids))
        return type("Output", (), {"logits": self.table(input_ids)})


class Tokens:
    sha256 = "0"

    def batch(self, seed: int, step: int, batch: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(16, (batch, seq + 1), generator=torch.Generator().manual_seed(step))
        return ids[:, :-1], ids[:, 1:].masked_fill(ids[:, 1:] > 12, -100)


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ({"batch": 8, "seq": 128}, [8]),
        ({"batch": 8, "seq": 512}, [4, 4]),
        ({"batch": 3, "seq": 4096}, [1, 1, 1]),
        ({"batch": 16, "seq": 128, "accumulate": 2}, [16]),
    ],
)
def test_a_step_is_that_of_the_whole_batch_whatever_its_microbatches(sizes: dict[str, int], rows: list[int]) -> None:
    config = TrainConfig(steps=2, microbatches=1, max_grad_norm=1e9, **sizes)
    torch.manual_seed(0)
    model = Words()
    before = model.table.weight.detach().clone().requires_grad_()
    row = plain.train_step(model, plain.make_optimizer(model, config), config, Tokens(), 0)
    assert model.rows == rows
    x, y = Tokens().batch(config.seed, 0, config.batch, config.seq)
    loss = nn.functional.cross_entropy(before[x].flatten(0, 1), y.flatten())
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(before.grad.norm().item(), rel=1e-5)


def test_its_speed_is_of_all_tokens_as_the_pipelines_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--compare` sets them side by side: of a chat, say, half of whose tokens are learnt, it once showed half."""
    config = TrainConfig(steps=1, microbatches=1, batch=8, seq=128)
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(plain.time, "perf_counter", lambda: next(clock))
    model = Words()
    row = plain.train_step(model, plain.make_optimizer(model, config), config, Tokens(), 0)
    assert row["tokens_per_s"] == 8 * 128 / 2.0


def test_its_result_does_not_hang_on_how_the_pipeline_is_cut() -> None:
    config = TrainConfig(steps=2)
    key = plain.reference_key(config, Tokens())
    for name, value in (("microbatches", 2), ("schedule", "zb"), ("precision", "bf16"), ("devices", "cpu")):
        assert plain.reference_key(replace(config, **{name: value}), Tokens()) == key
    assert plain.reference_key(replace(config, batch=16), Tokens()) != key
