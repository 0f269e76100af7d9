"""Processes of unlike machines: layers in proportion to what each has measured, packed where a link is slow."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pipelines import batch, devices
from ranks import in_ranks
from torch import nn

from spu import ModelParallelTrainer
from spu.cli.train import train_command
from spu.devices.speed import DeviceSpeed
from spu.distributed.links import RankLink
from spu.ops import use_backend
from spu.train.config import RunOptions
from spu.trainer import rank_machine


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))


def steps(engine: str, places: Any, **settings: Any) -> tuple[Any, list[float]]:
    with (
        use_backend("reference"),
        ModelParallelTrainer(
            model(), places, engine=engine, precision="fp32", microbatches=4, lr=1e-2, **settings
        ) as trainer,
    ):
        losses = [trainer.step(*batch(width=256, classes=256, seed=1)).loss for _ in range(2)]
        assert trainer.plan is not None
        return ([stage.layers for stage in trainer.plan.stages], list(trainer.plan.codecs)), losses


def told(speeds: tuple[float, ...], rate: float, settings: dict[str, Any]) -> tuple[Any, list[float]]:
    """Two steps where each rank is told its speed, if they are unlike, and that others' machines are that far away."""
    rank, count = dist.get_rank(), dist.get_world_size()
    if len(set(speeds)) > 1:
        rank_machine._kind = lambda device: str(speeds[rank])  # type: ignore[assignment]
    rank_machine.measure_device = lambda device: DeviceSpeed(  # type: ignore[attr-defined]
        speeds[rank], speeds[rank], speeds[rank], speeds[rank] / 10
    )
    rank_machine.time_packing = lambda *_: [1e10]  # type: ignore[attr-defined]
    rank_machine.measure_links = lambda job, pairs: [  # type: ignore[attr-defined]
        RankLink(a, b, rate, 1e-4) for pair in pairs for a, b in (pair, pair[::-1])
    ]
    if rate:
        rank_machine._host = lambda: str(rank % (count // settings.get("replicas", 1)))  # type: ignore[assignment]
    return steps("distributed", "auto", **settings)


@pytest.mark.usefixtures("one_thread")
def test_a_slow_process_gets_fewer_layers() -> None:
    first, second = in_ranks(2, told, (3e11, 1e11), 0.0, {})
    assert first == second  # rank 0's plan in both
    (layers, codecs), losses = first
    assert layers == [(0, 6), (6, 8)]
    assert codecs == ["none"]
    (alike, _), wanted = steps("local", devices(2))
    assert alike == [(0, 4), (4, 8)]
    assert losses == wanted


@pytest.mark.parametrize(
    ("rate", "transfer", "codec"), [(1e8, "auto", "int8"), (1e10, "auto", "none"), (1e8, "fp16", "fp16")]
)
def test_boundaries_are_packed_where_the_link_is_slow(rate: float, transfer: str, codec: str) -> None:
    first, second = in_ranks(2, told, (1e11, 1e11), rate, {"transfer": transfer})
    assert first == second
    assert first[0] == ([(0, 4), (4, 8)], [codec])


def test_of_pipelines_side_by_side_the_slowest_process_of_a_place_counts() -> None:
    found = in_ranks(4, told, (1e11, 3e11, 3e11, 3e11), 0.0, {"replicas": 2})
    assert all(each == found[0] for each in found)
    assert found[0][0][0] == [(0, 2), (2, 8)]


def test_processes_of_one_machine_are_planned_for_without_measuring() -> None:
    (layers, codecs), _ = in_ranks(2, told, (1e11, 1e11), 0.0, {})[0]
    assert (layers, codecs) == ([(0, 4), (4, 8)], ["none"])


CONFIG = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


def begin_and_go_on(folder: str) -> None:
    """A run of one step and its continuation, where each rank is told its speed: the first is fast, then the second."""
    os.chdir(folder)
    rank, size = dist.get_rank(), dist.get_world_size()
    rank_machine._kind = lambda device: str(rank)  # type: ignore[assignment]
    settings = {"model": "small.json", "data": ("text.txt",), "seq": 16, "batch": 8, "microbatches": 4}
    for steps, fast, options in (
        (1, 0, RunOptions(name="run", sample=False)),
        (2, 1, RunOptions(resume="run", sample=False)),
    ):
        if not dist.is_initialized():  # a run leaves its group
            dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=size)
        speed = 4e11 if rank == fast else 1e11
        measured = DeviceSpeed(speed, speed, speed, speed / 10)
        rank_machine.measure_device = lambda device, found=measured: found  # type: ignore[attr-defined]
        train_command({"steps": steps} | ({} if options.resume else settings), options)
        if rank == 0:
            shutil.copy("runs/run/plan.json", f"{steps}.json")


def test_a_run_goes_on_by_its_plan_whatever_is_measured_then(tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(json.dumps(CONFIG))
    (tmp_path / "text.txt").write_text("a line of the text that it learns\n" * 200)
    in_ranks(2, begin_and_go_on, str(tmp_path), timeout_s=120)
    first, second = (
        [stage["layers"] for stage in json.loads((tmp_path / f"{steps}.json").read_text())["stages"]]
        for steps in (1, 2)
    )
    assert first == second
    assert first[0][1] - first[0][0] > first[1][1] - first[1][0]
