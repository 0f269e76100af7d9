"""Stages that run their microbatches themselves: the same numbers as torch's own, and what is posted when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import in_ranks
from torch import Tensor, nn
from torch.distributed import pipelining

from spu.distributed.prompt_stage import DirectStage, PromptStage

PARTS, WIDTH, STEPS = 6, 8, 2
TARGETS = torch.randn(PARTS, 2, WIDTH, generator=torch.Generator().manual_seed(2))
INPUTS = torch.randn(PARTS, 2, WIDTH, generator=torch.Generator().manual_seed(1))
Watch = Callable[[str], None]


class Plain:
    """A module's part of each microbatch; with ``defers`` a backward leaves the parameters' gradients."""

    def __init__(self, module: nn.Module, *, first: bool, last: bool, defers: bool, watch: Watch) -> None:
        self.module, self.first, self.last, self.defers, self.watch = module, first, last, defers, watch
        self.ends: dict[int, tuple[Tensor, Tensor]] = {}
        self.left: dict[int, tuple[Tensor, Tensor | None]] = {}

    def forward(self, index: int, buffer: Tensor | None) -> Tensor:
        assert (buffer is None) == self.first
        x = INPUTS[index] if buffer is None else buffer.clone()  # torch's schedules receive into it again
        output = self.module(x.requires_grad_())
        if self.last:
            output = nn.functional.mse_loss(output, TARGETS[index])
        self.ends[index] = x, output
        self.watch("forward")
        return output.detach()

    def backward(self, index: int, buffer: Tensor | None) -> Tensor | None:
        assert (buffer is None) == self.last
        x, output = self.ends.pop(index)
        gradient = None if buffer is None else buffer.clone()
        if not self.defers:
            output.backward(gradient)
            return None if self.first else x.grad
        self.left[index] = output, gradient
        return None if self.first else torch.autograd.grad(output, x, gradient, retain_graph=True)[0]

    def weights(self, index: int) -> None:
        output, gradient = self.left.pop(index)
        output.backward(gradient, inputs=list(self.module.parameters()))


def trained(kind: type, schedule: str, watch: Watch = lambda _: None) -> list[Tensor]:
    """The gradients of this rank's parameters, after two steps."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    multi = "Interleaved" in schedule
    count, zero_bubble = ranks * (2 if multi else 1), "ZeroBubble" in schedule
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(count)]
    example = torch.zeros(2, WIDTH, device="meta", requires_grad=True)
    stages: list[Any] = []
    for k in range(rank, count, ranks):
        work: Any = layers[k]
        more: dict[str, Any] = {}
        if kind is not pipelining.PipelineStage:
            work = Plain(layers[k], first=k == 0, last=k == count - 1, defers=zero_bubble, watch=watch)
            more = {"defers": zero_bubble}
        stages.append(kind(work, k, count, torch.device("cpu"), input_args=example, output_args=example, **more))
    plain = kind is pipelining.PipelineStage
    loss = nn.functional.mse_loss if plain else lambda output, _: output
    runs = getattr(pipelining, schedule)(stages if multi else stages[0], PARTS, loss_fn=loss, scale_grads=False)
    prompt = [stage for stage in stages if isinstance(stage, PromptStage)]
    last = rank == ranks - 1
    for _ in range(STEPS):
        watch("step")
        for stage in prompt:
            stage.begin(PARTS)
        targets = TARGETS.flatten(0, 1) if last else None
        runs.step(*([INPUTS.flatten(0, 1)] if plain and rank == 0 else []), target=targets, return_outputs=False)
        for stage in prompt:
            stage.end()
            assert not stage._posted
            assert not stage._under_way
    return [p.grad for k in range(rank, count, ranks) for p in layers[k].parameters() if p.grad is not None]


def alike(schedule: str, kind: type) -> bool:
    found, expected = (trained(each, schedule) for each in (kind, pipelining.PipelineStage))
    return len(found) > 0 and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", [PromptStage, DirectStage])
@pytest.mark.parametrize(
    ("schedule", "ranks"),
    [("Schedule1F1B", 3), ("ScheduleGPipe", 2), ("ScheduleInterleaved1F1B", 2), ("ScheduleInterleavedZeroBubble", 2)],
)
def test_same_gradients_as_torchs_stage(schedule: str, ranks: int, kind: type) -> None:
    assert in_ranks(ranks, alike, schedule, kind) == [True] * ranks


def what_happens() -> list[str]:
    """What this rank does in its second step: messages posted and sent, microbatches run."""
    events: list[str] = []
    receive, send = dist.irecv, dist.isend

    def watched(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return function(*args, **kwargs)

        return call

    dist.irecv, dist.isend = watched("recv", receive), watched("send", send)
    try:
        trained(PromptStage, "Schedule1F1B", events.append)
    finally:
        dist.irecv, dist.isend = receive, send
    return events[len(events) - events[::-1].index("step") :]


def test_receives_come_before_the_first_forward_and_sends_right_after_their_own() -> None:
    for rank, kinds in enumerate(in_ranks(2, what_happens)):
        assert kinds[:PARTS] == ["recv"] * PARTS
        assert kinds.count("recv") == kinds.count("send") == kinds.count("forward") == PARTS
        if rank == 0:  # 1F1B's first two forwards; torch keeps the second's output back
            assert kinds[PARTS : PARTS + 4] == ["forward", "send", "forward", "send"]
