"""Layers that are run again in a thread of autograd's own, as on a GPU: the same bits as in the forward's."""

from __future__ import annotations

import pytest
import torch
from device_threads import device_threads
from parking import assert_parked_equals_kept, decoder, results, token_loss, tokens
from pipelines import WIDTH, batch, model_of
from torch import nn

from spu.skips import pop, stash

__all__ = ["device_threads"]

pytestmark = pytest.mark.usefixtures("reference", "device_threads")


class Stashes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stash("x", x)
        return x * 2


class Pops(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.2) + pop("x")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_waits_below_has_the_forced_backend_when_it_is_run_again(precision: str) -> None:
    """To bring it back forced one for a moment, and left the automatic one: other kernels saved other tensors."""
    x, y = tokens()
    counts = assert_parked_equals_kept(
        decoder(2), x, y, precision=precision, virtual=4, loss_fn=token_loss, microbatches=3
    )
    assert counts.kept == 0


@pytest.mark.parametrize(("schedule", "ranks", "virtual"), [("layer_outer", 1, 8), ("1f1b", 2, 1), ("gpipe", 3, 1)])
def test_draws_and_skips(
    schedule: str, ranks: int, virtual: int, device_threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = batch()
    model = model_of(Stashes(), nn.Tanh(), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH), Pops(), nn.GELU())
    how = {"schedule": schedule, "ranks": ranks, "virtual": virtual, "recompute": True, "microbatches": 4}
    ours, _, plan = results(model, x, y, None, **how)
    assert device_threads
    monkeypatch.undo()  # backwards in the workers themselves
    theirs, _, _ = results(model, x, y, None, plan=plan, **how)
    assert len(ours) == len(theirs) > 2
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
