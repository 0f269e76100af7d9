"""Stages in processes of their own give the numbers of one process, bit for bit: losses, norms, scales, skipped steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from numeric import assert_equal
from pipelines import devices
from ranks import in_ranks
from torch import nn

from spu import ModelParallelTrainer
from spu.ops import use_backend

ROWS = (16, 16, 13, 3)  # of the batches: a shorter last one, and one of fewer rows than microbatches


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 24),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.Linear(24, 24),
        nn.LayerNorm(24),
        nn.Linear(24, 24),
        nn.Dropout(0.1),
        nn.Linear(24, 5),
    )


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    draws = torch.Generator().manual_seed(1)
    for rows in ROWS:
        x, y = torch.randn(rows, 8, generator=draws), torch.randint(5, (rows,), generator=draws)
        y[0] = -100  # microbatches count different numbers of targets
        yield x, y


def steps(engine: str, places: Any, **settings: Any) -> list[tuple[float, ...]]:
    """Loss, norm, scale and skipped of each step, and the loss of an evaluation."""
    settings = {"microbatches": 4, "lr": 1e-2, "max_grad_norm": 1.0} | settings
    short = settings.get("schedule", "1f1b") == "gpipe"  # torch's other schedules want a microbatch for each stage
    with ModelParallelTrainer(model(), places, engine=engine, **settings) as trainer:
        found = []
        for x, y in batches():
            if len(x) >= 4 or short:
                result = trainer.step(x, y)
                found.append((result.loss, result.grad_norm, result.loss_scale, float(result.skipped)))
                found.append((trainer.evaluate(x, y),))
        return found


CASES: list[dict[str, Any]] = [
    {"precision": "fp32"},
    {"precision": "fp16", "schedule": "gpipe", "recompute": True},
    {"precision": "fp16", "transfer": "int8", "accumulate": 2, "microbatches": 2},
    {"precision": "fp16", "schedule": "interleaved"},
    {"precision": "fp32", "schedule": "zb"},
]


def all_cases(cases: list[dict[str, Any]]) -> list[Any]:
    with use_backend("reference"):
        return [steps("distributed", "auto", **case) for case in cases]


def local(cases: list[dict[str, Any]], count: int) -> list[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with use_backend("reference"):
            return [steps("local", devices(count), **case) for case in cases]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("ranks", "cases"), [(2, CASES), (4, CASES[:3:2])])
def test_ranks_give_the_numbers_of_one_process(ranks: int, cases: list[dict[str, Any]]) -> None:
    everyones = in_ranks(ranks, all_cases, cases)
    wanted = local(cases, ranks)
    for theirs in everyones:
        assert theirs == wanted
    if ranks == 2:  # and those of one stage
        assert local(cases[:1], 1) == wanted[:1]
        assert wanted[0][0] != wanted[0][2]
