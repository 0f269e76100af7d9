"""Which checkpoints are kept, the run that ends early, and its best weights; signals, and going on by one command."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from small_runs import losses, make_place, rows, run, summary, train

from spu.checkpoint import load, writing
from spu.checkpoint.copies import keep_copy
from spu.train import loop
from spu.train.keep import Checkpoints, disk_line
from spu.train.metrics import MetricsFile, read_metrics
from spu.train.run_folder import RunFolder
from spu.trainer.trainer import ModelParallelTrainer


def saving(step: int) -> SimpleNamespace:
    """A trainer whose checkpoint holds the step."""
    return SimpleNamespace(save=lambda path: writing.save(path, tensors={"w": torch.tensor(step)}, meta={}))


def kept(folder: Path) -> dict[str, int]:
    return {path.name: int(load(path)[0]["w"]) for path in sorted((folder / "checkpoints").glob("*"))}


def test_the_last_ones_and_the_best_are_kept_and_share_their_room(tmp_path: Path, no_sync: None) -> None:
    folder, metrics = RunFolder(tmp_path), MetricsFile(tmp_path / "metrics.jsonl")
    checkpoints = Checkpoints(folder, metrics, [], done=0, keep=2, best=True)
    for step, loss in enumerate([math.nan, 5.0, 4.0, 4.5, 3.0, 3.0], 1):
        metrics.append(step=step, val_loss=loss)
        assert checkpoints.improves(loss) == (step in (2, 3, 5))
        checkpoints.save(saving(step), step, loss if checkpoints.improves(loss) else None)
    assert kept(tmp_path) == {"best-00000005": 5, "step-00000005": 5, "step-00000006": 6}
    assert int(load(folder.checkpoint)[0]["w"]) == 6
    files = [path / "tensors.safetensors" for path in (folder.checkpoint, tmp_path / "checkpoints" / "step-00000006")]
    assert files[0].samefile(files[1])

    again = Checkpoints(folder, metrics, read_metrics(metrics.path), done=6, keep=1, best=True)
    assert (again.best_loss, again.best()[0]) == (3.0, 5)
    metrics.keep_up_to(5)  # an earlier one was put in place
    again = Checkpoints(folder, metrics, read_metrics(metrics.path), done=5, keep=1, best=True)
    assert sorted(kept(tmp_path)) == ["best-00000005", "step-00000005"]
    again.save(saving(6), 6)
    assert sorted(kept(tmp_path)) == ["best-00000005"]


def test_a_best_one_that_is_gone_does_not_keep_the_next_from_being_kept(tmp_path: Path, no_sync: None) -> None:
    """Back at step 4: the best of then was removed when step 5 was better, and step 5's is of a run that is not."""
    folder, metrics = RunFolder(tmp_path), MetricsFile(tmp_path / "metrics.jsonl")
    checkpoints = Checkpoints(folder, metrics, [], done=0, keep=3, best=True)
    for step, loss in enumerate([5.0, 3.0, 4.5, 4.0, 2.0], 1):
        metrics.append(step=step, val_loss=loss)
        checkpoints.save(saving(step), step, loss if checkpoints.improves(loss) else None)
    shutil.rmtree(folder.checkpoint)
    keep_copy(tmp_path / "checkpoints" / "step-00000004", folder.checkpoint)
    metrics.keep_up_to(4)
    again = Checkpoints(folder, metrics, read_metrics(metrics.path), done=4, keep=3, best=True)
    assert (again.best_loss, again.best()) == (4.0, (4, tmp_path / "checkpoints" / "best-00000004"))
    assert again.improves(3.5)


@pytest.mark.parametrize("between_renames", [False, True])
def test_what_a_crash_has_cut_short_is_made_up_for(tmp_path: Path, no_sync: None, between_renames: bool) -> None:
    """Killed between saving a checkpoint and keeping it as the best and among the last ones, or in the save itself."""
    folder, metrics = RunFolder(tmp_path), MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append(step=1, val_loss=5.0)
    Checkpoints(folder, metrics, [], done=0, keep=2, best=True).save(saving(1), 1, 5.0)
    metrics.append(step=2, val_loss=4.0)
    saving(2).save(folder.checkpoint)
    (tmp_path / "checkpoints" / ".step-00000002.new").mkdir()
    if between_renames:
        new, old = writing._leftovers(folder.checkpoint)
        shutil.copytree(tmp_path / "checkpoints" / "step-00000001", old)
        os.replace(folder.checkpoint, new)
    again = Checkpoints(folder, metrics, read_metrics(metrics.path), done=2, keep=2, best=True)
    assert kept(tmp_path) == {"best-00000002": 2, "step-00000001": 1, "step-00000002": 2}
    assert again.best_loss == 4.0
    assert read_metrics(metrics.path)[-1] == {"step": 2, "saved": True, "best": True}


@pytest.mark.parametrize("best", [False, True])
def test_a_checkpoint_that_a_crash_left_out_of_the_metrics_is_noted(tmp_path: Path, no_sync: None, best: bool) -> None:
    """One of thirty killed runs had it: killed after the save, before its row."""
    folder, metrics = RunFolder(tmp_path), MetricsFile(tmp_path / "metrics.jsonl")
    whole: list[object] = [{"step": 1, "val_loss": 4.0}, {"step": 1, "saved": True} | ({"best": True} if best else {})]
    metrics.append(step=1, val_loss=4.0)
    Checkpoints(folder, metrics, [], done=0, keep=1, best=best).save(saving(1), 1, 4.0 if best else None)
    assert read_metrics(metrics.path) == whole
    metrics.append(step=2, val_loss=5.0)
    saving(2).save(folder.checkpoint)
    whole += [{"step": 2, "val_loss": 5.0}, {"step": 2, "saved": True}]
    for _ in range(2):  # once
        Checkpoints(folder, metrics, read_metrics(metrics.path), done=2, keep=1, best=best)
        assert read_metrics(metrics.path) == whole


def test_a_copy_where_the_disk_has_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing.save(tmp_path / "a", tensors={"w": torch.ones(3)}, meta={"k": 1})
    (tmp_path / ".b.new").mkdir()  # left by a crash
    monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError("no links")))
    keep_copy(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    assert load(tmp_path / "b")[1] == {"k": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_the_room_is_stated_and_its_lack_too(tmp_path: Path) -> None:
    line = disk_line(RunFolder(tmp_path), 10**6, 2 * 10**6, keep=2, best=True)
    assert "up to 72.0 MB" in line
    assert "3 checkpoints of 16.0 MB, another while it is written" in line
    assert "make room" in disk_line(RunFolder(tmp_path), 10**15, 10**15, keep=1, best=False)


def test_a_run_that_gets_worse_ends_and_exports_its_best_weights(tmp_path: Path, capsys) -> None:
    from safetensors.torch import load_file

    place, folder = make_place(tmp_path), tmp_path / "runs" / "r"
    more = ("--eval-every", "1", "--patience", "2", "--export", "best", "--precision", "fp32", "--lr", "0.5")
    assert train(place, "r", *more, "--steps", "50", "--warmup-steps", "0") == 0
    curve = [row["val_loss"] for row in rows(place, "r") if "val_loss" in row]
    best = curve.index(min(curve)) + 1
    assert 1 <= best == len(curve) - 2 < 48
    assert (
        f"ended after step {best + 2} of 50: the validation loss was not below {min(curve):.4f}"
        in capsys.readouterr().out
    )
    result = summary(place, "r")
    assert (result["finished"], result["steps"], result["exported_step"]) == (True, best + 2, best)
    assert "not below" in result["ended_early"]
    tensors, meta = load(folder / "checkpoints" / f"best-{best:08d}")
    assert (meta["step"], load(folder / "checkpoint")[1]["step"]) == (best, best + 2)
    saved = load_file(folder / "model" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("model.norm.weight"))
    assert torch.equal(saved["model.norm.weight"], tensors[name])


def test_one_command_begins_a_run_and_goes_on_with_it(tmp_path: Path, monkeypatch, capsys) -> None:
    """SIGTERM ends it after its step with 0; a second signal ends it at once and harms no checkpoint."""
    place = make_place(tmp_path)
    common = ("--steps", "6", "--save-every", "2", "--evals", "1", "--resume", "auto")
    assert train(place, "whole", *common) == 0
    step_of = loop.Loop._train

    def stopped(self: loop.Loop, step: int):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_train", stopped)
        assert train(place, "r", *common) == 0
    assert "stopped after step 3 of 6, saved; go on with --resume" in capsys.readouterr().err
    result = summary(place, "r")
    assert (result["finished"], result["stopped_by"], result["steps"], result["saved"]) == (False, "SIGTERM", 3, True)

    write = writing._write

    def interrupted(*arguments):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_write", interrupted)
        assert train(place, "r", *common) == 130
    said = capsys.readouterr()
    assert "after step 3" in said.out
    assert said.err.splitlines()[-1] == "spu: interrupted"
    assert not (place / "runs" / "r" / "summary.json").exists()
    assert load(place / "runs" / "r" / "checkpoint")[1]["step"] == 3

    assert train(place, "r", *common) == 0
    assert summary(place, "r")["finished"] is True
    assert losses(place, "r") == losses(place, "whole")
    assert train(place, "r", *common) == 0
    assert "run r is complete" in capsys.readouterr().out
    assert run("train", "--resume", "auto", "--out", str(place / "runs")) == 2
    assert "--resume auto needs the run's --name" in capsys.readouterr().err


def test_the_last_validation_stops_between_its_batches_and_is_made_up_for(tmp_path: Path, monkeypatch, capsys) -> None:
    """It may take minutes, in which a signal went unheard."""
    place = make_place(tmp_path)
    common = ("--steps", "2", "--evals", "1", "--resume", "auto")
    assert train(place, "whole", *common) == 0
    seen = []
    evaluated = ModelParallelTrainer.evaluate

    def signalled(self: ModelParallelTrainer, *batch):
        seen.append(batch)
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluated(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_validate", lambda self, step: None)
        patch.setattr(ModelParallelTrainer, "evaluate", signalled)
        assert train(place, "r", *common) == 0
    assert len(seen) == 1
    assert "stopped after step 2 of 2, saved; go on with --resume" in capsys.readouterr().err
    assert summary(place, "r")["finished"] is False
    assert train(place, "r", *common) == 0
    again, whole = summary(place, "r"), summary(place, "whole")
    assert again["finished"] is True
    assert again["val_loss"] == whole["val_loss"]


def test_a_run_of_epochs_is_made_longer_by_more_of_them(tmp_path: Path, capsys) -> None:
    """Of prompts and responses: the loss, and what a step's targets count, is of the responses alone."""
    place = make_place(tmp_path)
    pairs = [{"prompt": f"Double of {n}: ", "response": str(2 * n)} for n in range(20)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def epochs(count: str) -> int:
        given = ("--seq", "32", "--evals", "1", "--resume", "auto", "--epochs", count)
        return train(place, "r", *given, data="pairs.jsonl")

    assert epochs("1") == 0
    epoch = len(losses(place, "r"))
    assert epochs("1.5") == 0
    steps = [row for row in rows(place, "r") if "loss" in row]
    assert len(steps) == round(1.5 * epoch) > epoch
    assert all(0 < row["targets"] < 24 and row["tokens"] == 64 * row["step"] for row in steps)
    capsys.readouterr()
    assert epochs("1.5") == 0
    assert "run r is complete" in capsys.readouterr().out
    assert epochs("1") == 2
    assert "--epochs 1: the run has" in capsys.readouterr().err
