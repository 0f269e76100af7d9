"""Processes that do not see rank 0's disk load its checkpoint all the same, and no older one of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from pipelines import devices
from ranks import in_ranks
from test_distributed_ties import batch, make, steps

from spu.checkpoint import CheckpointError
from spu.ops import use_backend
from spu.trainer import distributed


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each process, which stands for its own disk."""
    monkeypatch.chdir(tmp_path)
    for rank in range(4):
        (tmp_path / f"rank{rank}").mkdir()


def begin(place: Path, first: int) -> None:
    """A checkpoint of two steps of one process."""
    with use_backend("reference"), make("local", devices(1), 4, precision="fp16") as trainer:
        steps(trainer, first, first + 2)
        trainer.save(place, {"first": first})


def go_on(engine: str, places: Any, folder: str) -> Any:
    """Load what is called "saved" in this process's own folder, or in rank 0's; what follows, or the error."""
    os.chdir(folder)
    if dist.is_initialized():
        os.chdir(f"rank{dist.get_rank()}")
    with use_backend("reference"), make(engine, places, 4, precision="fp16") as trainer:
        trainer.prepare(*batch(0))
        try:
            extra = trainer.load("saved")
        except ValueError as error:
            return str(error)
        found = extra, steps(trainer, 2, 4)
        trainer.save("after")
        return found, os.path.exists("after")


@pytest.mark.usefixtures("one_thread")
def test_what_rank_0_has_is_read_by_all_and_nothing_else(tmp_path: Path) -> None:
    begin(tmp_path / "rank0" / "saved", 0)
    begin(tmp_path / "rank2" / "saved", 5)  # of another run
    os.symlink(tmp_path / "rank0" / "saved", tmp_path / "rank3" / "saved")  # this one sees rank 0's
    wanted, _ = go_on("local", devices(4), str(tmp_path / "rank0"))
    assert wanted[0] == {"first": 0}
    everyones = in_ranks(4, go_on, "distributed", "auto", str(tmp_path))
    assert everyones == [(wanted, rank == 0) for rank in range(4)]  # written by rank 0, on its own disk


def test_what_rank_0_cannot_read_is_told_in_every_process(tmp_path: Path) -> None:
    begin(tmp_path / "rank1" / "saved", 0)
    for text in in_ranks(2, go_on, "distributed", "auto", str(tmp_path)):
        assert text.startswith("rank 0 has no checkpoint at saved, which it reads for all, and rank 1 has one")
    (tmp_path / "rank1" / "saved").rename(tmp_path / "rank0" / "saved")
    with open(tmp_path / "rank0" / "saved" / "tensors.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    first, second = in_ranks(2, go_on, "distributed", "auto", str(tmp_path))
    assert "is damaged: its checksum does not match" in first
    assert second.startswith("rank 0 could not read the checkpoint: CheckpointError")


def again(folder: str) -> Any:
    """Rank 1, which reads from rank 0, fails once; the next load is whole."""
    os.chdir(f"{folder}/rank{dist.get_rank()}")
    with use_backend("reference"), make("distributed", "auto", 4, precision="fp16") as trainer:
        trainer.prepare(*batch(0))
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == 1:
                patch.setattr(distributed, "load_training", lambda *_, opened, **more: opened().__enter__() and 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    trainer.load("saved")
            else:
                patch.setattr(trainer._spread._peers, "agree", lambda: None)  # type: ignore[union-attr]
                trainer.load("saved")
        trainer.load("saved")
        return steps(trainer, 2, 3)


@pytest.mark.usefixtures("one_thread")
def test_a_load_that_has_failed_can_be_repeated(tmp_path: Path) -> None:
    begin(tmp_path / "rank0" / "saved", 0)
    os.chdir(tmp_path / "rank0")
    with use_backend("reference"), make("local", devices(2), 4, precision="fp16") as trainer:
        trainer.prepare(*batch(0))
        trainer.load("saved")
        wanted = steps(trainer, 2, 3)
    assert in_ranks(2, again, str(tmp_path)) == [wanted, wanted]


def another_model(folder: str) -> str:
    os.chdir(f"{folder}/rank{dist.get_rank()}")
    with make("distributed", "auto", in_loss=True) as trainer:
        trainer.prepare(*batch(0))
        with pytest.raises(CheckpointError) as raised:
            trainer.load("saved")
        return str(raised.value)


def test_a_load_that_fails_in_rank_0_ends_the_others_wait(tmp_path: Path) -> None:
    begin(tmp_path / "rank0" / "saved", 0)
    first, second = in_ranks(2, another_model, str(tmp_path))
    assert first.startswith("the checkpoint is of another model")
    assert second.startswith("rank 0 reads the checkpoint for this process, and has failed")
