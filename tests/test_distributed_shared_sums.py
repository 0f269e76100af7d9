"""Gradients added up in shared memory: exact, in the order of ranks, and the same as over the transport."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import in_ranks
from torch import nn

from spu import ModelParallelTrainer
from spu.distributed import peers, shared_sums
from spu.distributed.shared_memory import shared_places
from spu.distributed.shared_sums import SharedSums, place_bytes
from spu.distributed.sums import GradientSums

PIECE = 1000  # elements, in the place of 4 million


class Delayed(SharedSums):
    """Reads late in one process, which the others must wait for before they write there again."""

    def _add(self, *given: Any) -> None:
        if dist.get_rank() == 1:
            time.sleep(0.02)
        super()._add(*given)


def add() -> list[bool]:
    """Five steps over parameters of several pieces; what each gets is compared with all processes' gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    places = shared_places(dist.group.WORLD, place_bytes(PIECE))
    assert places is not None
    sums = Delayed(dist.group.WORLD, places)
    shapes = [(3,), (7, 300), (0, 4), (PIECE,), (2, 3, 8, 8), (), (2500,), (5, 1)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    with torch.no_grad():
        parameters[4] = nn.Parameter(parameters[4].to(memory_format=torch.channels_last))
    draws, right = torch.Generator().manual_seed(rank), []
    for step in range(5):
        sums.begin({0: parameters[:3], 1: parameters[3:]}, set(), 1)
        for index, parameter in enumerate(parameters):
            with sums.backward(index > 2, parameters):
                parameter.grad = torch.empty_like(parameter).normal_(generator=draws)
        parameters[1].grad = None if step == 1 or (step == 2 and rank != 1) else parameters[1].grad
        if step == 3 and rank == 1:
            parameters[6].grad[[3, 1500]] = torch.tensor([torch.inf, torch.nan])  # type: ignore[index]
        memory = parameters[3].grad.data_ptr()  # type: ignore[union-attr]
        everyones: list[Any] = [None] * size
        dist.all_gather_object(everyones, [None if p.grad is None else p.grad.clone() for p in parameters])
        sums.end()
        for parameter, *each in zip(parameters, *everyones, strict=True):
            if all(part is None for part in each):
                right.append(parameter.grad is None)
                continue
            wanted = torch.zeros_like(parameter) if each[0] is None else each[0].clone()
            for part in each[1:]:
                wanted += 0 if part is None else part
            right.append(torch.equal(parameter.grad.nan_to_num(nan=0.5), wanted.nan_to_num(nan=0.5)))
            right.append(parameter.grad.dtype == torch.float32 and parameter.grad.shape == parameter.shape)
        right.append(parameters[3].grad.data_ptr() == memory)  # added to in place
        right.append(parameters[4].grad.is_contiguous(memory_format=torch.channels_last))
    sums.cancel()
    sums.close()
    return right


@pytest.mark.parametrize("count", [2, 3])
def test_sums_are_those_of_all_processes_bit_for_bit(count: int) -> None:
    for found in in_ranks(count, add):
        assert len(found) == 5 * 8 * 2 + 5 * 2 - 1
        assert all(found)


def test_a_piece_that_parameters_fill_is_the_only_one() -> None:
    def cut(sizes: list[int], most: int) -> list[list[tuple[int, int, int]]]:
        return [[tuple(part) for part in piece] for piece in shared_sums._pieces(sizes, most)]

    assert cut([3, 2], 5) == [[(0, 0, 3), (1, 0, 2)]]  # the usual case: a place is as large as the gradients
    assert cut([3, 0, 4], 5) == [[(0, 0, 3), (2, 0, 2)], [(2, 2, 4)]]
    assert cut([12], 5) == [[(0, 0, 5)], [(0, 5, 10)], [(0, 10, 12)]]
    assert cut([], 5) == cut([0], 5) == [[]]


def add_nothing() -> list[Any]:
    places = shared_places(dist.group.WORLD, place_bytes(PIECE))
    assert places is not None
    sums, found = SharedSums(dist.group.WORLD, places), []
    for parameters in ([], [nn.Parameter(torch.zeros(0))]):
        sums = SharedSums(dist.group.WORLD, places)
        sums.begin({0: parameters}, set(), 1)
        sums.end()
        found.append([p.grad for p in parameters])
    return found


def test_a_process_that_trains_nothing_waits_for_the_others() -> None:
    assert in_ranks(2, add_nothing) == [[[], [None]]] * 2


class Net(nn.Module):
    """A layer that runs twice, a view of a parameter, a frozen layer, one that nobody uses, and 16-bit conversions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.scale, self.unused = nn.Parameter(torch.ones(2, 8)), nn.Linear(3, 3)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(torch.tanh(self.first(x)))) * self.scale.view(16)
        return self.last(self.frozen(x))


def train(precision: str, shared: bool) -> tuple[list[type], list[float], list[Any]]:
    made, make = [], peers.PipelinePeers._sums

    def noted(*given: Any, **how: Any) -> Any:
        found = make(*given, **how)
        made.append(type(found))
        return found

    peers._SHARING, peers.PipelinePeers._sums = (8 if shared else 0), noted
    net, draws = Net(), torch.Generator().manual_seed(5)
    with ModelParallelTrainer(
        net, engine="distributed", replicas=2, microbatches=2, precision=precision, lr=1e-2, max_grad_norm=0.5
    ) as trainer:
        losses = []
        for _ in range(4):
            x, y = torch.randn(12, 6, generator=draws), torch.randint(4, (12,), generator=draws)
            result = trainer.step(x, y)
            losses += [result.loss, result.grad_norm]
    return made, losses, [p.tolist() for p in net.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_training_is_the_same_as_over_the_transport(precision: str) -> None:
    shared, sent = in_ranks(2, train, precision, True), in_ranks(2, train, precision, False)
    assert [rank[0] for rank in shared + sent] == [[SharedSums]] * 2 + [[GradientSums]] * 2
    assert all(rank[1:] == shared[0][1:] for rank in (*shared, *sent))
