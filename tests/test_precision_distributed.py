"""spu.GradScaler under DistributedDataParallel: two processes, of which one overflows, and torch's class as the truth.

The test's own process is rank 0; this file, run as a script, is rank 1.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import spu
from spu.ops import use_backend

OVERFLOWS = {1: 0, 3: 1}  # step -> the rank whose batch overflows


def train(scaler_class: type, rank: int, bucket_view: bool) -> tuple[list[float], list[Tensor]]:
    """The scales after each step, and the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    if scaler_class is spu.GradScaler:
        spu.accelerate(model)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    scaler = scaler_class("cpu", init_scale=1024.0, growth_interval=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scales = []
    for step in range(5):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * step + rank))
        factor = float("inf") if OVERFLOWS.get(step) == rank else 1.0
        optimizer.zero_grad(set_to_none=step != 2)
        scaler.scale(parallel(x).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, copy.deepcopy(list(model.parameters()))


def run_rank(rank: int, store: str) -> list[Any]:
    """What every rank made of each loop."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=2, init_method=f"file://{store}", timeout=timedelta(seconds=60)
    )
    try:
        with use_backend("reference"):
            own = [train(cls, rank, view) for view in (False, True) for cls in (torch.amp.GradScaler, spu.GradScaler)]
        everyones: list[Any] = [None, None]
        dist.all_gather_object(everyones, own)
        return everyones
    finally:
        dist.destroy_process_group()


def test_an_overflow_on_one_rank_skips_the_step_on_all(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    other = subprocess.Popen([sys.executable, __file__, store])
    try:
        everyones = run_rank(0, store)
        assert other.wait(timeout=60) == 0
    finally:
        other.kill()
        other.wait()
    for torchs, ours, torchs_views, our_views in everyones:
        for theirs, own in ((torchs, ours), (torchs_views, our_views)):
            assert own[0] == theirs[0] == [1024, 512, 512, 256, 256]
            for a, b in zip(own[1], theirs[1], strict=True):
                assert torch.isfinite(a).all()
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


if __name__ == "__main__":
    run_rank(1, sys.argv[1])
