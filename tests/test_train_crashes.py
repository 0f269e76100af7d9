"""Runs that are killed, that diverge, or whose disk fails; and going on with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from small_runs import losses, make_place, resume, train

from spu.checkpoint import writing as checkpoint

SCRIPT = Path(__file__).with_name("killed_runs.py")
TWO = ("--evals", "1", "--devices", "cpu:0,cpu:1")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return make_place(tmp_path)


def steps(place: Path, name: str) -> list[int]:
    return [step for step, _ in losses(place, name)]


@pytest.mark.timeout(600)  # half a minute of one core, and what a busy machine makes of that
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_run_killed_at_any_change_of_the_disk_goes_on(tmp_path: Path) -> None:
    """Killed between the two renames of a save, it began again at step 1 without a word. Here only that.

    Also a run that streams its layers from a disk; elsewhere than on Linux its file has a name for a moment.
    """
    kinds = ["resident", "streamed"] if hasattr(os, "O_TMPFILE") else ["resident"]
    command = [sys.executable, str(SCRIPT), str(tmp_path), *(f"{kind}:27:1:1" for kind in kinds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == kinds, done.stdout
    assert done.stdout.count("saved 2") == len(kinds)


def test_a_disk_that_is_a_file_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was a traceback, as was every other failure of a tier."""
    (place / "file").write_text("")
    budget = ("--budget", f"cpu=1GB,disk={place / 'file'}:1GB", "--residency", "streamed", "--devices", "cpu")
    assert train(place, "r", *TWO, *budget, "--steps", "1") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"spu: error: {place / 'file'} cannot be made: File exists")
    assert not (place / "runs" / "r").exists()


def test_a_run_killed_between_the_two_renames_of_a_save_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(place, "r", *TWO, "--steps", "4", "--save-every", "2") == 0
    folder = place / "runs" / "r" / "checkpoint"
    new, old = checkpoint._leftovers(folder)
    shutil.copytree(folder, new)
    os.replace(folder, old)
    (place / "runs" / "r" / "summary.json").unlink()
    assert resume(place, "r") == 0
    assert f"going on with {place / 'runs' / 'r'} after step 4" in capsys.readouterr().out
    assert steps(place, "r") == [1, 2, 3, 4]


def test_a_run_whose_checkpoint_is_gone_is_not_begun_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(place, "r", *TWO, "--steps", "4", "--save-every", "2") == 0
    shutil.rmtree(place / "runs" / "r" / "checkpoint")
    (place / "runs" / "r" / "summary.json").unlink()
    before = (place / "runs" / "r" / "metrics.jsonl").read_bytes()
    assert resume(place, "r") == 2
    assert "step 4 was saved in" in capsys.readouterr().err
    assert (place / "runs" / "r" / "metrics.jsonl").read_bytes() == before


def test_a_diverged_run_is_an_error_and_leaves_no_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ended with exit code 0, a validation loss of null and a saved model."""
    assert train(place, "r", *TWO, "--lr", "1e30", "--steps", "3") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "the run diverged" in said
    assert "there is no checkpoint: start a new run with a smaller --lr than 1e+30" in said
    assert not (place / "runs" / "r" / "model").exists()
    assert not (place / "runs" / "r" / "summary.json").exists()
    assert train(place, "one", *TWO, "--lr", "1e30", "--steps", "1") == 2
    assert "the validation loss is not finite after step 1" in capsys.readouterr().err
    assert train(place, "plain", *TWO, "--lr", "1e30", "--steps", "3", "--reference") == 2
    assert "the reference diverged" in capsys.readouterr().err


def test_a_good_checkpoint_and_model_outlive_a_divergence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(place, "r", *TWO, "--steps", "2", "--save-every", "1") == 0
    folder = place / "runs" / "r"
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"lr": 0.002', '"lr": 1e30'))
    weights = (folder / "model" / "model.safetensors").read_bytes()
    assert resume(place, "r", "--steps", "5") == 2
    said = capsys.readouterr()
    assert f"going on with {folder} after step 2" in said.out
    assert "the checkpoint is that of step" in said.err
    assert (folder / "model" / "model.safetensors").read_bytes() == weights


def test_a_run_is_made_longer_but_not_shorter(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(place, "r", *TWO, "--steps", "2") == 0
    assert resume(place, "r", "--steps", "1") == 2
    assert "--steps 1: the run has 2 steps, which can be raised but not lowered" in capsys.readouterr().err
    assert resume(place, "r", "--steps", "4") == 0
    assert steps(place, "r") == [1, 2, 3, 4]
    assert json.loads((place / "runs" / "r" / "config.json").read_text())["settings"]["steps"] == 4
    capsys.readouterr()
    assert resume(place, "r") == 0
    assert "is complete; --steps with a larger number goes on" in capsys.readouterr().out
    assert resume(place, "r", "--tokens", "80") == 0
    assert steps(place, "r") == [1, 2, 3, 4, 5]


def test_the_final_sample_can_be_left_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(place, "r", *TWO, "--steps", "1") == 0
    assert "sample:" not in capsys.readouterr().out
    assert "sample" not in json.loads((place / "runs" / "r" / "summary.json").read_text())
