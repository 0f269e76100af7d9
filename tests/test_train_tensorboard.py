"""A run from one YAML file: its numbers for TensorBoard, a step of many tokens, and its own file given again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from small_runs import losses, make_place, rows, run, train

from spu.train.tensorboard import TensorBoard


def written(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars by tag and step."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_a_file_makes_a_run_and_the_run_leaves_a_file_that_makes_it_again(tmp_path: Path, capsys) -> None:
    place = make_place(tmp_path)
    (place / "job.yaml").write_text(
        f"model: {place / 'tiny.json'}\ndata: {place / 'text.txt'}\nout: {place / 'runs'}\nname: a\nsteps: 3\nseq: 8\n"
        "microbatches: 2\nbatch: 2\ntokens-per-step: 40\ndevices: cpu\nsample: off\ntensorboard: on\neval-every: 2\n"
    )
    assert run("train", "--config", str(place / "job.yaml")) == 0
    assert "a step of 48 tokens: 6 sequences in 6 microbatches (--batch 6 --accumulate 3)" in capsys.readouterr().out
    own = ("--config", str(place / "runs" / "a" / "config.yaml"), "--out", str(place / "runs"), "--sample", "off")
    assert run("train", *own, "--name", "b") == 0
    assert losses(place, "a") == losses(place, "b")
    assert run("train", *own, "--name", "a", "--resume", "auto") == 0
    assert "run a is complete" in capsys.readouterr().out

    scalars = written(place / "runs" / "a" / "tensorboard")
    for tag, key in (("train/loss", "loss"), ("train/lr", "lr"), ("validation/loss", "val_loss")):
        expected = {row["step"]: pytest.approx(row[key]) for row in rows(place, "a") if key in row}
        assert scalars[tag] == expected, tag
    assert set(scalars["train/tokens_per_s"]) == {1, 2, 3}


def test_a_killed_runs_later_steps_are_taken_out(tmp_path: Path) -> None:
    for done, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        board = TensorBoard(tmp_path, done)
        for step in steps:
            board.add({"step": step, "loss": done * 10.0 + step, "grad_norm": None, "skipped": False})
            board.add({"step": step, "saved": True})
        board.close()
    scalars = written(tmp_path)
    losses = {1: 1.0, 2: 12.0, 3: 13.0, 4: 14.0}
    assert scalars == {"train/loss": losses, "train/skipped": dict.fromkeys(losses, 0.0)}


@pytest.mark.parametrize(
    "text",
    [
        "lerning-rate: 1", "seq: eight", "lr: {peak: 1}", "- lr", "seq: 8\nseq: 16", "lr: [1", "lr: !!binary x", "\0",
    ],
)  # fmt: skip
def test_a_malformed_file_is_one_line_and_nothing_is_written(tmp_path: Path, text: str, capsys) -> None:
    place = make_place(tmp_path)
    (place / "job.yaml").write_text(text)
    before = sorted(place.rglob("*"))
    assert run("train", "--config", str(place / "job.yaml"), "--out", str(place / "runs")) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"spu: error: --config {place / 'job.yaml'}")
    assert said.count("\n") == 1
    assert sorted(place.rglob("*")) == before


def test_without_the_package_the_command_says_which_it_is(tmp_path: Path, monkeypatch, capsys) -> None:
    place = make_place(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(place, "r", "--tensorboard") == 2
    assert "--tensorboard needs a package: pip install tensorboard" in capsys.readouterr().err
    assert not (place / "runs").exists()
