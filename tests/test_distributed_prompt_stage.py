"""Stages whose messages do not wait for the schedule: the same numbers as torch's own, and what is posted when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import in_ranks
from torch import nn
from torch.distributed import pipelining

from spu.distributed import prompt_stage
from spu.distributed.prompt_stage import PromptStage

PARTS, WIDTH, STEPS = 6, 8, 2
Made = type[pipelining.PipelineStage]


def stages_of(kind: Made, each: int) -> list[pipelining.PipelineStage]:
    """This rank's stages of a model with ``each`` a rank, in a loop over the ranks."""
    rank, count = dist.get_rank(), each * dist.get_world_size()
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(count)]
    example = torch.zeros(2, WIDTH, device="meta", requires_grad=True)
    return [
        kind(layers[k], k, count, torch.device("cpu"), input_args=example, output_args=example)
        for k in range(rank, count, dist.get_world_size())
    ]


def trained(kind: Made, schedule: str, watch: Callable[[list[Any]], None] | None = None) -> list[torch.Tensor]:
    """The gradients of this rank's parameters, after two steps."""
    multi = schedule.startswith("ScheduleInterleaved")
    stages = stages_of(kind, 2 if multi else 1)
    if watch is not None:
        watch(stages)
    runs = getattr(pipelining, schedule)(stages if multi else stages[0], PARTS, loss_fn=nn.MSELoss())
    x = torch.randn(2 * PARTS, WIDTH, generator=torch.Generator().manual_seed(1))
    for _ in range(STEPS):
        for stage in stages:
            if isinstance(stage, PromptStage):
                stage.begin(PARTS)
        first, last = dist.get_rank() == 0, dist.get_rank() == dist.get_world_size() - 1
        runs.step(*([x] if first else []), target=x if last else None, return_outputs=False)
        for stage in stages:
            if isinstance(stage, PromptStage):
                stage.end()
                assert not stage._posted
                assert not stage._sent
    return [p.grad for stage in stages for p in stage.submod.parameters() if p.grad is not None]


def both(schedule: str) -> bool:
    found, expected = (trained(kind, schedule) for kind in (PromptStage, pipelining.PipelineStage))
    return len(found) > 0 and all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("schedule", "ranks"),
    [("Schedule1F1B", 3), ("ScheduleGPipe", 2), ("ScheduleInterleaved1F1B", 2), ("ScheduleInterleavedZeroBubble", 2)],
)
def test_same_gradients_as_torchs_stage(schedule: str, ranks: int) -> None:
    assert in_ranks(ranks, both, schedule) == [True] * ranks


def what_happens() -> list[str]:
    """What this rank does in its second step: messages posted and sent, microbatches run."""
    events: list[str] = []
    post, send = prompt_stage._received, PromptStage._send

    def posting(*args: Any) -> dist.Work:
        events.append("recv")
        return post(*args)

    def sending(stage: PromptStage, ops: list[Any], *args: Any) -> None:
        events.extend(["send"] * len(ops))
        send(stage, ops, *args)

    def watch(stages: list[Any]) -> None:
        stages[0].submod.register_forward_pre_hook(lambda *_: events.append("forward"))

    prompt_stage._received, PromptStage._send = posting, sending  # type: ignore[method-assign]
    try:
        trained(PromptStage, "Schedule1F1B", watch)
    finally:
        prompt_stage._received, PromptStage._send = post, send  # type: ignore[method-assign]
    return events[len(events) // STEPS :]


def test_receives_come_before_the_first_forward_and_sends_right_after_their_own() -> None:
    for rank, kinds in enumerate(in_ranks(2, what_happens)):
        assert kinds[:PARTS] == ["recv"] * PARTS
        assert kinds.count("recv") == kinds.count("send") == kinds.count("forward") == PARTS
        if rank == 0:  # 1F1B's first two forwards; torch keeps the second's output back
            assert kinds[PARTS : PARTS + 4] == ["forward", "send", "forward", "send"]
