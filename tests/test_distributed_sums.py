"""Gradients leave during the last backward; their sums do not depend on when: exact in fp32, within fp16's bound."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import in_ranks
from torch import nn

from spu import ModelParallelTrainer
from spu.distributed import peers
from spu.distributed import sums as module
from spu.distributed.grad_wire import WIRES
from spu.distributed.sums import GradientSums
from spu.engine.engine import StageError

SIZE = 300_000  # more than a bucket of a small model


class Seen(torch.autograd.Function):
    """Identity; its backward notes which buckets have left."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sums: GradientSums, found: list[list[bool]]) -> torch.Tensor:
        ctx.of = sums, found
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        sums, found = ctx.of
        found.append([bucket.sending is not None for bucket in sums._buckets])
        return grads[0], None, None


def add(wire: str, extreme: float) -> dict[str, Any]:
    """Three steps of two backwards: plain; a gradient that is changed afterwards in one process; one that is inf."""
    rank, draws = dist.get_rank(), torch.Generator().manual_seed(7 + dist.get_rank())
    first, second, third = (nn.Parameter(torch.randn(SIZE, generator=draws)) for _ in range(3))
    unused, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    parameters = [unused, first, second, third, late]
    sums = GradientSums(dist.new_group(), wire)  # nothing else is sent in this group
    result: dict[str, Any] = {"left": [], "errors": []}
    for step in range(3):
        for parameter in parameters:
            parameter.grad = None
        sums.begin({0: parameters}, {id(late)}, 2)
        for _ in range(2):
            x = torch.randn(SIZE, generator=draws)
            with sums.backward(0, parameters):
                y = Seen.apply(x * first * late.sum(), sums, result["left"]) * second
                y = y * third + (unused.sum() if rank else 0.0)
                (y * extreme).mean().backward()
        if rank and step == 1:
            second.grad.mul_(3.0)
        if rank and step == 2:
            second.grad[5] = torch.inf
        everyones: list[Any] = [None, None]
        dist.all_gather_object(everyones, [None if p.grad is None else p.grad.clone() for p in parameters])
        sums.end()
        for parameter, *each in zip(parameters, *everyones, strict=True):
            parts = [torch.zeros_like(parameter) if part is None else part for part in each]
            wanted = parts[0] + parts[1]
            if wire == "fp32":
                result["errors"].append(float(not torch.equal(parameter.grad, wanted)))
            else:
                finite = wanted.isfinite()
                assert not parameter.grad[~finite].isfinite().any()
                if finite.all():
                    bound = 2**-11 * 1.001 * (parts[0].abs() + parts[1].abs() + wanted.abs())
                    bound += 2**-40 * max(part.abs().max() for part in (*parts, wanted))
                    result["errors"].append(((parameter.grad - wanted).abs() / bound).nan_to_num(nan=0).max().item())
        result["sums"] = [parameter.grad.double().sum().item() for parameter in (first, third, unused)]
    return result


@pytest.mark.parametrize(("wire", "extreme"), [("fp32", 1.0), ("fp16", 1e38), ("fp16", 1e-30)])
def test_sums_are_right_whenever_gradients_leave(wire: str, extreme: float) -> None:
    both = in_ranks(2, add, wire, extreme)
    for found in both:
        assert max(found["errors"]) <= (0.0 if wire == "fp32" else 1.0)
        # Nothing leaves in a step's first backward; in its second one the third parameter's bucket has.
        assert [sum(left) for left in found["left"]][::2] == [0, 0, 0]
        assert all(left[0] and not left[-1] for left in found["left"][1::2])
    assert both[0]["sums"] == both[1]["sums"]


def add_nothing() -> list[tuple[int, ...]]:
    found = []
    for wire in WIRES.values():
        sending = wire(torch.zeros(0), dist.group.WORLD)
        sending.half_way()
        found.append(tuple(sending.sum().shape))
    return found


def test_a_bucket_of_parameters_without_elements_is_added_up_too() -> None:
    assert in_ranks(2, add_nothing) == [[(0,)] * len(WIRES)] * 2


class Adds(torch.autograd.Function):
    """Identity; its backward runs a backward of its own, which adds to a gradient that was complete."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        ctx.parameter = [parameter]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        with torch.enable_grad():
            (ctx.parameter[0] * (2.0 + dist.get_rank())).sum().backward()
        return grads[0], None


def repeat(kept: int) -> list[tuple[bool, list[bool], set[str], int]]:
    """Steps in which a gradient gets more: whether sums are right, what had left, who waits from now on, and how many
    gradients were seen to be complete. The first parameter is frozen in the third step.
    """
    module._KEPT = kept
    draws = torch.Generator().manual_seed(7 + dist.get_rank())
    first, second = (nn.Parameter(torch.randn(SIZE, generator=draws)) for _ in range(2))
    names = {id(first): "first", id(second): "second"}
    sums, result = GradientSums(dist.new_group()), []
    complete, seen = sums._complete, []
    sums._complete = lambda key: (seen.append(key), complete(key))[1]  # type: ignore[method-assign,assignment]
    for step in range(6):
        first.requires_grad_(step != 2)
        first.grad = second.grad = None
        sums.begin({0: [first, second]}, set(), 2)
        left: list[list[bool]] = []
        for k in range(2):
            seen.clear()
            x = torch.randn(SIZE, generator=draws)
            with sums.backward(0, [first, second]):
                y = Seen.apply(x * first, sums, left)
                y = Adds.apply(y, second) if step in (1, 4) and k else y
                (y * second).mean().backward()
                inside = len(seen)
        everyones: list[Any] = [None, None]
        dist.all_gather_object(everyones, [None if p.grad is None else p.grad.clone() for p in (first, second)])
        sums.end()
        right = all(
            (p.grad is None) == (a is None) and (a is None or torch.equal(p.grad, a + b))
            for p, a, b in zip((first, second), *everyones, strict=True)
        )
        result.append((right, left[-1] if left else [], {names[key] for key in sums._again}, inside))
    sums.close()
    sums._watching.append(sums._complete)
    seen.clear()
    (first * second).sum().backward()
    assert not seen
    return result


@pytest.mark.parametrize("kept", [8, 1])
def test_a_gradient_that_gets_more_goes_again(kept: int) -> None:
    for found in in_ranks(2, repeat, kept):
        assert [row[0] for row in found] == [True] * 6
        assert [row[1] for row in found] == [[True, False], [True, False], [], *[[False, False]] * 3]
        assert [row[2] for row in found] == [set(), *[{"second"}] * 5]
        # Hooks that stay from step to step see no more than those that do not; a frozen parameter's is made anew.
        assert [row[3] for row in found] == [2, 3, 1, 2, 3, 2]


def train(wire: str) -> list[tuple[float, float, bool]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    with ModelParallelTrainer(
        net, engine="distributed", replicas=2, microbatches=2, precision="fp32", lr=1e-2, grad_wire=wire
    ) as trainer:
        found = [trainer.step(x, y)]
        spoilt = x.clone()
        spoilt[-1, 0] = torch.inf  # a row of the second pipeline
        found += [trainer.step(spoilt, y), trainer.step(x, y)]
        return [(result.loss, result.grad_norm, result.skipped) for result in found]


def test_what_is_not_finite_in_one_pipeline_is_seen_in_both() -> None:
    wanted, found = in_ranks(2, train, "fp32"), in_ranks(2, train, "fp16")
    for first, second in (wanted, found):
        assert [row[2] for row in first] == [row[2] for row in second] == [False, True, False]
        assert first[0] == second[0]
        assert first[2] == second[2]
    assert found[0][0][0] == wanted[0][0][0]
    assert found[0][0][1] != wanted[0][0][1]
    assert found[0][0][1] == pytest.approx(wanted[0][0][1], rel=2 * 2**-11)


def test_a_wire_without_pipelines_is_refused() -> None:
    with pytest.raises(ValueError, match="grad_wire='fp16' would change nothing"):
        ModelParallelTrainer(nn.Sequential(nn.Linear(2, 2)), "cpu", grad_wire="fp16")


class Stuck(torch.autograd.Function):
    """Sleeps in rank 0 before its backward; fails in rank 1 after the layers behind, whose gradients have left."""

    asked = False

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        if Stuck.asked and dist.get_rank() == 0:
            time.sleep(8)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        if Stuck.asked and dist.get_rank() == 1:
            raise ArithmeticError("as asked")
        return grad


class Sticking(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Stuck.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def fail_with_a_sum_under_way(wire: str) -> tuple[str, bool, float]:
    """Returns the error, whether something was on its way, and how long it took to leave."""
    peers._SHARING = 1  # no shared memory
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 600), Sticking(), nn.Linear(600, 600), nn.Linear(600, 600))
    trainer = ModelParallelTrainer(
        model, "cpu", engine="distributed", replicas=2, microbatches=1, precision="fp32", loss_fn=nn.MSELoss(),
        grad_wire=wire,
    )  # fmt: skip
    x, y = torch.ones(4, 4), torch.zeros(4, 600)
    trainer.step(x, y)
    Stuck.asked = True
    try:
        trainer.step(x, y)
        said = "no error"
    except (ConnectionError, StageError) as error:
        said = str(error)
    sums = trainer._spread._peers.sums  # type: ignore[union-attr]
    assert isinstance(sums, GradientSums)
    under_way, begin = sums.under_way(), time.monotonic()
    trainer.close()
    return said, under_way, time.monotonic() - begin


@pytest.mark.skipif(sys.platform != "linux", reason="connections are found in /proc")
@pytest.mark.parametrize("wire", ["fp32", "fp16"])
def test_a_process_that_fails_with_a_sum_under_way_leaves_at_once(wire: str) -> None:
    """It waited for the others' part, as torch ends no collective over gloo before its time."""
    (lost, *_), (failed, under_way, took) = in_ranks(2, fail_with_a_sum_under_way, wire, timeout_s=60)
    assert "ArithmeticError: as asked" in failed
    assert under_way
    assert took < 4, took
    assert lost.startswith("rank 0 exchanged gradients with rank 1, which has ended or no longer answers"), lost
