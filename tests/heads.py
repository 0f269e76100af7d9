"""For tests of models that end in a linear head: the models, their batches, and a pass with and without logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pipelines import devices
from torch import Tensor, nn

from spu import ModelParallelTrainer
from spu.common.torch_private import is_fake
from spu.engine import head_loss
from spu.ops import cross_entropy as op

VOCAB, WIDTH, LENGTH, PARTS = 101, 24, 5, 4


@pytest.fixture
def calls(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of each call's loss; all logits are large enough, and are made in several chunks."""
    found: list[torch.dtype] = []

    def counted(function: Any, *args: Any) -> Tensor | None:
        loss = function(*args)
        if loss is not None and not is_fake(loss):  # planning runs it too
            found.append(loss.dtype)
        return loss

    for name in ("linear_cross_entropy", "cross_entropy_share"):
        monkeypatch.setattr(head_loss, name, functools.partial(counted, getattr(op, name)))
    monkeypatch.setattr(head_loss, "WORTH_BYTES", 0)
    monkeypatch.setitem(op._CHUNK_BYTES, "cpu", 2000)
    return found


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


class Decoder(nn.Module):
    """No list of layers: its forward is traced."""

    def __init__(self, after: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.embed, self.body, self.norm, self.head = nn.Embedding(VOCAB, WIDTH), Body(), nn.LayerNorm(WIDTH), linear()
        self.after = after

    def forward(self, ids: Tensor) -> Any:
        return self.after(self.head(self.norm(self.body(self.embed(ids)))))


def linear(**options: Any) -> nn.Linear:
    return nn.Linear(WIDTH, VOCAB, **({"bias": False} | options))


def stack(*ending: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Embedding(VOCAB, WIDTH), Body(), Body(), *ending)


def tied() -> nn.Sequential:
    model = stack(linear())
    model[3].weight = model[0].weight
    nn.init.normal_(model[0].weight, std=0.3)
    return model


ENDINGS: dict[str, Callable[[], nn.Module]] = {
    "bare": lambda: stack(linear()),
    "sequence": lambda: stack(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.LayerNorm(WIDTH), linear())),
    "traced": Decoder,
    "tied": tied,
}


def made(ending: str = "bare", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ENDINGS[ending]()


def batch(rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randint(VOCAB, (rows, LENGTH), generator=generator) for _ in range(2))
    y[torch.rand(rows, LENGTH, generator=generator) < 0.3] = -100  # uneven counts of masked targets
    return x, y


def trainer(model: Any, ranks: int = 2, **settings: Any) -> ModelParallelTrainer:
    return ModelParallelTrainer(model, devices(ranks), **({"precision": "fp32", "microbatches": PARTS} | settings))


Found = dict[str, Tensor]
"""The loss and all gradients of a pass, in fp32."""


def one_pass(t: ModelParallelTrainer, model: nn.Module, x: Any, y: Tensor, *, keep_outputs: bool) -> Found:
    loss, _ = t.forward_backward(x, y, keep_outputs=keep_outputs)
    assert t.scaler.found_inf().item() == 0
    return {"loss": loss} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def both_ways(model: nn.Module, x: Any, y: Tensor, calls: list[torch.dtype], **settings: Any) -> tuple[Found, Found]:
    """Without logits, and the plain way, because outputs are wanted; the model then has the precision's parameters."""
    with trainer(model, **settings) as t:
        t.prepare(*batch() if len(x) < PARTS else (x, y))
        ours = one_pass(t, model, x, y, keep_outputs=False)
        assert len(calls) == min(len(x), PARTS)
        plain = one_pass(t, model, x, y, keep_outputs=True)
        assert calls == [torch.float32] * min(len(x), PARTS)
    return ours, plain


def decoder(family: str) -> nn.Module:
    from test_model_huggingface import make_model

    return make_model(family)  # type: ignore[no-any-return]
