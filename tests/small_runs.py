"""`spu` in this process, and its runs on a model of some thousand parameters: what tests of commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from killed_runs import CONFIG

from spu.cli.app import main
from spu.train.metrics import read_metrics, train_rows


def make_place(folder: Path) -> Path:
    """A folder with a model's config and a text."""
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return folder


def run(*arguments: object) -> int:
    """The exit code of `spu ARGUMENTS`."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def options(place: Path, data: str) -> list[str]:
    given = ["--model", str(place / "tiny.json"), "--data", str(place / data), "--out", str(place / "runs")]
    return [*given, "--seq", "8", "--microbatches", "2", "--batch", "2", "--devices", "cpu", "--no-sample"]


def train(place: Path, name: str, *more: str, data: str = "text.txt") -> int:
    return run("train", *options(place, data), "--name", name, *more)


def resume(place: Path, name: str, *more: str) -> int:
    return run("train", "--out", str(place / "runs"), "--resume", name, "--no-sample", *more)


def rows(place: Path, name: str) -> list[dict[str, Any]]:
    return read_metrics(place / "runs" / name / "metrics.jsonl")


def losses(place: Path, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in train_rows(rows(place, name))]


def summary(place: Path, name: str) -> dict[str, Any]:
    return json.loads((place / "runs" / name / "summary.json").read_text())
