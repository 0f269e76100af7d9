"""Stages in processes of their own give the numbers of one process, bit for bit: losses, norms, scales, skips."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from memory_probe import measured_peaks
from pipelines import devices
from ranks import in_ranks
from torch import nn

from spu import ModelParallelTrainer
from spu.engine.engine import StageError
from spu.ops import use_backend

ROWS = (16, 13, 3, 1)  # of the batches: a shorter last one, fewer rows than microbatches, fewer than stages


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
        if rows > 1:
            y[0] = -100  # microbatches count different numbers of targets
        yield x, y


def steps(engine: str, places: Any, **settings: Any) -> list[tuple[float, ...]]:
    """Loss, norm, scale and skipped of each step, and the loss of an evaluation."""
    settings = {"microbatches": 4, "lr": 1e-2, "max_grad_norm": 1.0} | settings
    short = settings.get("schedule", "1f1b") in ("1f1b", "gpipe")  # torch's others want a microbatch for each stage
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
    {"precision": "fp16", "schedule": "gpipe", "recompute": True, "transfer": "int8"},
    {"precision": "fp16", "schedule": "interleaved", "accumulate": 2, "microbatches": 2},
    {"precision": "fp32", "schedule": "zbv", "transfer": "int8"},
]


def all_cases(cases: list[dict[str, Any]]) -> list[Any]:
    with use_backend("reference"):
        return [steps("distributed", "auto", **case) for case in cases]


def local(cases: list[dict[str, Any]], count: int) -> list[Any]:
    torch.set_num_threads(1)
    with use_backend("reference"):
        return [steps("local", devices(count), **case) for case in cases]


@pytest.mark.parametrize(("ranks", "cases"), [(2, CASES), (4, [{"precision": "fp32", "schedule": "zb"}])])
def test_ranks_give_the_numbers_of_one_process(ranks: int, cases: list[dict[str, Any]]) -> None:
    everyones = in_ranks(ranks, all_cases, cases)
    wanted = local(cases, ranks)
    for theirs in everyones:
        assert theirs == wanted
    if ranks == 2:  # and those of one stage
        assert local(cases[:1], 1) == wanted[:1]
        assert wanted[0][0] != wanted[0][2]


def counted() -> list[tuple[dict[str, int], dict[str, int]]]:
    found = []
    for schedule in ("1f1b", "gpipe"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 256), *(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(4)))
        x, y = torch.randn(256, 64), torch.randint(256, (256,))
        told: list[str] = []
        settings = {"precision": "fp16", "microbatches": 4, "schedule": schedule, "report": told.append}
        with ModelParallelTrainer(net, "auto", engine="distributed", **settings) as trainer:
            trainer.step(x, y)
            trainer.step(x, y)
            assert trainer.plan is not None
            plan = dict(zip(trainer.plan.devices, trainer.plan.predicted.peak_bytes))
            found.append((plan, measured_peaks(trainer, (x, y))))
            assert [word for word in told[0].split() if word in plan] != []
    return found


def test_each_process_reports_its_own_peak_which_is_the_planned_one() -> None:
    """Activations were not counted, and of other processes' stages the gradients that they do not have here."""
    for rank, cases in enumerate(in_ranks(2, counted)):
        for plan, measured in cases:
            name = f"rank{rank}"
            assert list(measured) == [name]
            assert 0.9 * plan[name] < measured[name] <= plan[name]


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 3:  # the last microbatch of 13 rows
            raise ArithmeticError("a layer of the user's")
        return x


def fail() -> str:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Broken(), nn.Linear(8, 5))
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.1)
    with ModelParallelTrainer(net, engine="distributed", precision="fp32", microbatches=4) as trainer:
        trainer.step(torch.ones(16, 8), torch.zeros(16, dtype=torch.int64))
        try:
            trainer.step(torch.ones(13, 8), torch.zeros(13, dtype=torch.int64))
        except StageError as error:
            return f"{error}\nby {type(error.__cause__).__name__}"  # which a command's exit code goes by
    return "no error"


def test_a_failed_stage_is_named_in_every_rank() -> None:
    first, last = in_ranks(2, fail)
    assert last.startswith("stage 1 (rank1), action 1F1, microbatch 1: ArithmeticError: a layer of the user's")
    assert "for rank 1 (stages [1]), which has ended or no longer answers" in first
    assert first.startswith("stage 0 (rank0)")
    assert last.endswith("by ArithmeticError")
    assert first.endswith("by ConnectionError")


class Ends(nn.Module):
    """In its fourth forward, a process is killed in the midst of it, or does not come back for some seconds."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.runs = how, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        if self.runs == 4 and dist.get_rank() == 1 and x.device.type == "cpu" and self.training:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(6.5)
        return x


def lose(how: str, place: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5), Ends(how))
    with ModelParallelTrainer(net, engine="distributed", precision="fp32", microbatches=2) as trainer:
        try:
            for _ in range(4):
                trainer.step(torch.ones(4, 8), torch.zeros(4, dtype=torch.int64))
        except StageError as error:
            if dist.get_rank() == 0:
                Path(place).write_text(str(error))
            raise


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_lost_process_is_named_by_its_neighbour(tmp_path: Path, how: str) -> None:
    with pytest.raises(AssertionError, match="rank 1") as failed:
        in_ranks(2, lose, how, str(tmp_path / "said"), timeout_s=5 if how == "hangs" else 60)
    assert "still running" not in str(failed.value)
    said = (tmp_path / "said").read_text()
    assert said.startswith("stage 0 (rank0), action 0")
    assert "for rank 1 (stages [1]), which has ended or no longer answers" in said


def part(evaluates: int) -> str:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5))
    batch = torch.ones(4, 8), torch.zeros(4, dtype=torch.int64)
    trainer = ModelParallelTrainer(net, engine="distributed", precision="fp32", microbatches=2)
    trainer.step(*batch)
    try:
        (trainer.evaluate if dist.get_rank() == evaluates else trainer.step)(*batch)
    except (StageError, RuntimeError) as error:
        return str(error)
    return "nothing was wrong"


def test_a_process_that_evaluates_while_another_trains_is_told() -> None:
    """It took the other's messages for its own, and gloo ended it by SIGABRT."""
    with ThreadPoolExecutor() as side_by_side:  # all that they do is wait
        runs = list(side_by_side.map(lambda evaluates: in_ranks(2, part, evaluates, timeout_s=4), (0, 1)))
    for evaluates, said in enumerate(runs):
        trains = said[1 - evaluates]
        assert f"for rank {evaluates} (stages [{evaluates}]), which has ended or no longer answers" in trains, said
        assert "nothing was wrong" not in said


def differ() -> str:
    torch.manual_seed(dist.get_rank())
    with ModelParallelTrainer(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), engine="distributed") as trainer:
        try:
            trainer.prepare(torch.ones(8, 2), torch.zeros(8, dtype=torch.int64))
        except ValueError as error:
            return str(error)
    return "no error"


def test_processes_that_made_other_models_are_told() -> None:
    for text in in_ranks(2, differ):
        assert text.startswith("rank 1 has another set of initial weights than rank 0")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"replan": True}, "replan=True: layers do not move"),
        ({"residency": "streamed"}, "residency='streamed'"),
        ({"schedule": "layer_outer"}, "give one of 'gpipe'"),
        ({}, "torchrun --nproc-per-node 2 script.py"),
    ],
)
def test_what_it_cannot_do_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        ModelParallelTrainer(model(), engine="distributed", **settings)
