"""For tests of activations that wait below the device: models, and runs with and without a store."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fake_store import FakeStore
from numeric import assert_equal
from pipelines import WIDTH, trainer
from torch import nn

import spu
from spu import ModelParallelTrainer
from spu.memory.activations import ActivationStore, Counts
from spu.memory.store import Store
from spu.memory.unit import allocated

CPU = torch.device("cpu")


def activations_in(
    store: Store, sizes: Sequence[int], codec: str | None = None, device: torch.device = CPU
) -> ActivationStore:
    return ActivationStore(store, allocated({}, store, sizes)[1], device, codec=codec)


@contextlib.contextmanager
def parked(
    t: ModelParallelTrainer,
    store: Store,
    codec: str | None = None,
    *,
    size: int = 1 << 14,
    count: int = 100,
) -> Iterator[ActivationStore]:
    """The trainer, prepared, with its activations in a store; nothing is left in it at the end."""
    assert t._runner is not None
    activations = activations_in(store, [size] * count, codec)
    for stage in t._runner.built.stages:
        stage.activations = activations
    try:
        yield activations
        assert not activations._records
        assert not activations._order
        assert len(activations._free) == count
    finally:
        for stage in t._runner.built.stages:
            stage.activations = None
        store.close()


def results(
    model: nn.Module,
    x: Any,
    y: torch.Tensor,
    store: Store | None,
    *,
    plan: spu.Plan | None = None,
    steps: int = 2,
    how: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[list[torch.Tensor], Counts, spu.Plan]:
    """Losses, gradients and buffers of some passes, with the activations in the store; None: on the device."""
    own = copy.deepcopy(model)
    found: list[torch.Tensor] = []
    settings = {"schedule": "layer_outer", "virtual": len(list(own.children())), "recompute": True} | settings
    ranks = settings.pop("ranks", 1)
    with trainer(own, ranks, plan=plan, **settings) as t:
        t.prepare(x, y)
        with parked(t, store, **(how or {})) if store is not None else contextlib.nullcontext() as activations:
            for _ in range(steps):
                loss, _ = t.forward_backward(x, y)
                found += [loss, *(p.grad.clone() for p in own.parameters() if p.grad is not None)]
            found += [buffer.clone() for buffer in own.buffers()]
        assert t.plan is not None
        return found, activations.counts if activations is not None else Counts(), t.plan


def assert_parked_equals_kept(model: nn.Module, x: Any, y: torch.Tensor, **settings: Any) -> Counts:
    """The results are the same, bit for bit, and something was parked."""
    kept, _, plan = results(model, x, y, None, **settings)
    ours, counts, _ = results(model, x, y, FakeStore(), plan=plan, **settings)
    assert len(ours) == len(kept)
    for index, (a, b) in enumerate(zip(ours, kept, strict=True)):
        assert_equal(a, b, f"result {index}")
    assert counts.parked > 0
    return counts


class Fn(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


class Block(nn.Module):
    """A decoder's block: attention with a causal mask and a gated MLP."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.gate, self.down = nn.Linear(width, 32), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).movedim(-3, 0).transpose(2, 3)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x)


def decoder(blocks: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, WIDTH), *(Block() for _ in range(blocks)), Head())


def tokens(rows: int = 8, length: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(11, (rows, length), generator=generator), torch.randint(
        11, (rows, length), generator=generator
    )


def token_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs.flatten(0, 1).float(), targets.flatten())
