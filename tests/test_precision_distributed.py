"""spu.GradScaler under DistributedDataParallel: two processes, of which one overflows, and torch's class beside it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks import in_ranks
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


def all_loops() -> list[Any]:
    """What a rank makes of each loop; arrays, which need no memory of the process that ends."""
    with use_backend("reference"):
        made = [
            train(cls, dist.get_rank(), view)
            for view in (False, True)
            for cls in (torch.amp.GradScaler, spu.GradScaler)
        ]
    return [(scales, [weight.detach().numpy() for weight in weights]) for scales, weights in made]


def test_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    for torchs, ours, torchs_views, our_views in in_ranks(2, all_loops):
        for theirs, own in ((torchs, ours), (torchs_views, our_views)):
            assert own[0] == theirs[0] == [1024, 512, 512, 256, 256]
            for a, b in zip(own[1], theirs[1], strict=True):
                assert np.isfinite(a).all()
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
