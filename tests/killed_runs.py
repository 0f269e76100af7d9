"""Runs of `spu train` killed before their n-th change of the disk, and gone on with. Run by test_train_crashes.py.

    python tests/killed_runs.py FOLDER RESIDENCY:FIRST:STRIDE:COUNT ...

prints a line for each: the residency, the number, what was to happen, what going on gave. This process only imports
and forks. With RESIDENCY "streamed" or "offloaded" layers come from a disk, in whose folder no run may leave a file.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from tiny_models import BYTES

from spu.cli.app import main
from spu.train.metrics import read_metrics, train_rows

# What a run imports on its way, two thirds of its time: once, before the forks.
IMPORTED = (
    "torch._dynamo.config", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "transformers.generation",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "spu.trainer.trainer",
    "spu.train.loop", "spu.train.results",
)  # fmt: skip
CONFIG = {**BYTES, "hidden_size": 8, "intermediate_size": 8}


def kill_before(number: int) -> None:
    """From now on the process dies before its `number`-th change of the disk; 0: it counts, into `counted`."""
    counted = 0

    def wrapped(function: Any) -> Any:
        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal counted
            counted += 1
            if counted == number:
                print("KILLED before", function.__name__, *map(str, args[:2]), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return operation

    os.replace, os.fsync, shutil.rmtree = map(wrapped, (os.replace, os.fsync, shutil.rmtree))
    Path.mkdir, Path.replace = wrapped(Path.mkdir), wrapped(Path.replace)  # type: ignore[method-assign]


def in_child(number: int, *arguments: str) -> tuple[int, str]:
    """(exit code, output) of `spu ARGUMENTS` in a forked process that dies at `number`; negative: the signal."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(there, 1)
        os.dup2(there, 2)
        if number:
            kill_before(number)
        code = 1
        try:
            main(list(arguments))
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(there)
    with os.fdopen(here) as pipe:
        output = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in train_rows(read_metrics(folder / "metrics.jsonl"))]


def check(folder: Path, number: int, whole: list[tuple[int, float]], options: list[str]) -> str:
    """Kill one run and go on with it; "" where the run had ended before."""
    name, place = f"run{number}", folder / "runs" / f"run{number}"
    code, output = in_child(number, "train", *options, "--name", name)
    if code == 0:
        return ""
    assert code == -signal.SIGKILL, output
    assert not any((folder / "disk").iterdir())
    killed = next(line for line in output.splitlines() if line.startswith("KILLED"))
    rows = read_metrics(place / "metrics.jsonl") if place.exists() else []
    saved = max((row["step"] for row in rows if row.get("saved")), default=0)
    if (place / "config.json").exists():
        code, output = in_child(0, "train", "--out", str(folder / "runs"), "--resume", name)
        if saved:
            assert f"going on with {place} after step" in output, (killed, saved, output)
    else:
        code, output = in_child(0, "train", *options, "--name", name)
    assert code == 0, (killed, output)
    assert losses(place) == whole, (killed, losses(place), whole)
    assert (place / "model" / "model.safetensors").exists()
    gone_on = next((line.split("after ")[1] for line in output.splitlines() if line.startswith("going on")), "step 0")
    assert not any((folder / "disk").iterdir())
    shutil.rmtree(place)
    return f"{number}: {killed}; saved {saved}; went on after {gone_on}"


def main_of_test(folder: Path, residency: str, first: int, stride: int, count: int) -> None:
    (folder / "disk").mkdir(parents=True)
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    options = ["--model", str(folder / "tiny.json"), "--data", str(folder / "text.txt"), "--out", str(folder / "runs")]
    for name, value in (("steps", 6), ("seq", 8), ("microbatches", 2), ("batch", 2), ("evals", 1)):
        options += [f"--{name}", str(value)]
    if residency == "resident":
        options += ["--devices", "cpu:0,cpu:1"]
    else:
        options += ["--devices", "cpu", "--residency", residency, "--state", "exact"]
        options += ["--budget", f"cpu=1GB,disk={folder / 'disk'}:1GB"]
    options += ["--save-every", "2", "--no-sample"]
    code, output = in_child(0, "train", *options, "--name", "whole")
    assert code == 0, output
    whole = losses(folder / "runs" / "whole")
    for number in range(first, first + stride * count, stride):
        if not (line := check(folder, number, whole, options)):
            break
        print(residency, line, flush=True)


if __name__ == "__main__":
    for module in IMPORTED:
        importlib.import_module(module)
    for index, runs in enumerate(sys.argv[2:]):
        residency, *numbers = runs.split(":")
        main_of_test(Path(sys.argv[1]) / f"{index}-{residency}", residency, *map(int, numbers))
