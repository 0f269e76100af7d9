"""Gradients that wait below in bf16: what is trained is what their rounded values train, to the last bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checked_streams import CheckedStreams
from pipelines import devices
from streamed_runs import Lazy, batches, make, model, trained
from torch import nn

from spu import ModelParallelTrainer
from spu.memory.host_store import HostStore
from spu.memory.slab import Slab
from spu.memory.unit import narrow, piece
from spu.optim.adamw import AdamW

BF16 = torch.bfloat16


def rounding(self: AdamW, **keywords: Any) -> Any:
    for group in self.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.copy_(parameter.grad.to(BF16))
    return STEP(self, **keywords)


STEP = AdamW.step


@pytest.mark.parametrize(
    ("precision", "residency", "host", "clip"),
    [("fp16", "streamed", False, 0.1), ("fp32", "offloaded", False, None), ("fp16", "offloaded", True, None)],
)
def test_trains_as_a_resident_run_whose_gradients_are_rounded(
    reference: None, monkeypatch: pytest.MonkeyPatch, precision: str, residency: str, host: bool, clip: float | None
) -> None:
    settings = {"precision": precision, "recompute": True, "max_grad_norm": clip}
    plain, own = model(True), model(True)
    with monkeypatch.context() as patched:
        patched.setattr(AdamW, "step", rounding)
        wanted = trained(make(monkeypatch, plain, None, **settings), plain)
    store = HostStore() if host else Lazy()
    streams = {"streams": CheckedStreams()} if host else {}
    found = trained(make(monkeypatch, own, store, residency, grads=BF16, **streams, **settings), own)
    grads = [k for k, tensor in enumerate(found) if not torch.equal(tensor, wanted[k])]
    # `forward_backward` runs no update: what it leaves in .grad is all that differs, by its rounding.
    assert all(torch.equal(found[k], wanted[k].to(BF16).float()) for k in grads)
    assert 0 < len(grads) < len(found) // 2


def test_the_fast_kernels_round_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, own = model(), model()
    with monkeypatch.context() as patched:
        patched.setattr(AdamW, "step", rounding)
        wanted = trained(make(monkeypatch, plain, None, precision="fp16"), plain)
    found = trained(make(monkeypatch, own, Lazy(), precision="fp16", grads=BF16), own)
    losses = slice(0, 10)
    assert all(torch.equal(a, b) for a, b in zip(found[losses], wanted[losses], strict=True))


def test_half_the_bytes_of_gradients_cross(reference: None, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    for dtype in (torch.float32, BF16):
        store = Lazy()
        trainer = make(monkeypatch, model(), store, precision="fp32", grads=dtype)
        trainer.step(*batches(1)[0])  # nothing is updated yet
        written.append(store.written_bytes)
        streaming = trainer._runner.updater.streaming  # type: ignore[union-attr]
        assert streaming is not None
        assert store.written_bytes == sum(unit.grad_bytes for unit in streaming.units.values())
        trainer.close()
    assert written[1] < written[0]  # in whole pages


class Huge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sum(-1, keepdim=True)


def test_a_finite_gradient_that_rounds_to_infinity_leaves_the_update_out(reference: None, tmp_path: Path) -> None:
    """fp32 reaches a little further than bf16: 3.40e38 and 3.39e38."""
    own = nn.Sequential(Huge(), nn.Identity())
    settings = {"tiers": f"disk={tmp_path}:1GB", "residency": "streamed", "grads": "bf16", "precision": "fp32"}
    with ModelParallelTrainer(own, devices(1), microbatches=1, loss_fn=lambda y, t: y.sum(), **settings) as trainer:
        ordinary = trainer.step(torch.ones(1, 4), torch.zeros(1, 1))
        assert not ordinary.skipped
        huge = trainer.step(torch.full((1, 4), 3.395e38), torch.zeros(1, 1))
        assert huge.skipped
        assert math.isinf(huge.grad_norm)
        trainer.flush()
        assert own[0].weight.isfinite().all()


def test_resident_gradients_are_not_rounded() -> None:
    with pytest.raises(ValueError, match="grads bf16 would change nothing: gradients of resident layers"):
        ModelParallelTrainer(model(), devices(1), residency="resident", grads="bf16")


@pytest.mark.parametrize("sizes", [(1,), (0, 3), (7, 100_000, 1, 33)])
def test_narrow_rounds_in_place(sizes: tuple[int, ...]) -> None:
    def laid(dtype: torch.dtype) -> Any:
        return piece("gradients", [((size,), dtype, lambda tensor: None, lambda: None) for size in sizes])

    wide, half = laid(torch.float32), laid(BF16)
    memory = Slab(wide.bytes).slots([wide.bytes])[0]
    values = [torch.randn(size) * 10.0 ** torch.randint(-30, 30, (size,)) for size in sizes]
    values[-1][0] = math.nan
    for view, value in zip(wide.views(memory), values):
        view.copy_(value)
    narrow(wide, half, memory)
    for view, value in zip(half.views(memory), values):
        assert torch.equal(view.view(torch.int16), value.to(BF16).view(torch.int16))
