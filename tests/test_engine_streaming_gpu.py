"""Streaming to a real GPU: the device is late, so that a wait that is missing changes the losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spu import DeviceManager, ModelParallelTrainer

pytestmark = pytest.mark.gpu
WIDTH, LAYERS = 512, 6


class Late(nn.Module):
    """A layer that the device reaches long after the host has enqueued it."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH))
        self.rounds = rounds
        self.register_buffer("noise", torch.ones(2048, 2048) / 2048)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise: torch.Tensor = self.noise  # type: ignore[assignment]
        for _ in range(self.rounds):
            noise = noise @ self.noise  # type: ignore[operator]
        return self.layer(x + 0 * noise[0, 0].to(x.dtype))


def model(rounds: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Late(rounds) for _ in range(LAYERS)), nn.Linear(WIDTH, 16))


def train(own: nn.Module, tiers: str | None, **settings: Any) -> list[float]:
    """Train ten steps; between them streamed weights are on the CPU and buffers on the GPU."""
    trainer = ModelParallelTrainer(
        own,
        DeviceManager("cuda:0=4GB").get_devices("cuda:0"),
        tiers=tiers,
        microbatches=4,
        lr=1e-3,
        max_grad_norm=1.0,
        loss_fn=nn.CrossEntropyLoss(),
        **settings,
    )
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(10):
        x, y = torch.randn(32, WIDTH, generator=generator), torch.randint(0, 16, (32,), generator=generator)
        losses.append(float(trainer.step(x, y).loss))
        if tiers is not None and settings["residency"] == "streamed":
            assert {p.device.type for p in own.parameters()} == {"cpu"}
            assert {b.device.type for b in own.buffers()} == {"cuda"}
    trainer.flush() if tiers is not None else None
    assert all(p.isfinite().all() for p in own.parameters())
    trainer.close()
    return losses


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("residency", ["streamed", "offloaded"])
@pytest.mark.parametrize("kind", ["host", "disk"])
def test_a_late_device_gives_the_same_losses(kind: str, residency: str, precision: str, tmp_path: Path) -> None:
    tiers = "cpu=8GB" if kind == "host" else f"cpu=1GB,disk={tmp_path}:8GB"
    settings = {"precision": precision, "residency": residency}
    punctual, late = (train(model(rounds), tiers, **settings) for rounds in (0, 40))
    assert late == punctual
    resident = train(model(0), None, precision=precision)
    assert resident[0] == punctual[0]  # before the first update
    assert resident == pytest.approx(punctual, rel=5e-3)  # the host rounds its updates otherwise
