"""The main job beside plain PyTorch, and two stages beside one: whole steps of `spu train`, in turns.

Each way is a process of its own that does steps when it is told to; ratios are medians over the rounds.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import cpu_name
from goals import GOALS
from must_reach import MUST_REACH, kind

PEERS = Path(__file__).with_name("job_peers.py")
ROUNDS, STEPS = 7, 3
WAYS = {
    "the default job": ("pipeline",),
    "--reference": ("reference",),
    "one stage, all cores": ("pipeline", "devices=cpu", "microbatches=1"),
    "eight microbatches, 1f1b": ("pipeline", "microbatches=8", "schedule=1f1b"),
    "two replicas": ("replicas",),
}

pytestmark = [
    pytest.mark.goals, pytest.mark.skipif(os.cpu_count() is None or os.cpu_count() < 2, reason="needs two cores"),
]  # fmt: skip


class Way:
    """A process that trains the job in one way."""

    def __init__(self, arguments: tuple[str, ...]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(PEERS), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.what = ""

    def wait(self) -> None:
        """Wait until it is set up and has done two steps."""
        assert self._process.stdout is not None
        self.what = self._process.stdout.readline().strip()
        self.seconds(2)

    def seconds(self, steps: int) -> float:
        """Do so many steps and return what the median one took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def test_the_main_job_beside_plain_pytorch_and_one_stage() -> None:
    with contextlib.ExitStack() as stack:
        ways = {name: Way(arguments) for name, arguments in WAYS.items()}
        for way in ways.values():
            stack.callback(way.close)
        for way in ways.values():
            way.wait()
        turns = [{name: way.seconds(STEPS) for name, way in ways.items()} for _ in range(ROUNDS)]

    def ratio(peer: str) -> float:
        return statistics.median(turn[peer] / turn["the default job"] for turn in turns)

    GOALS.head(f"the main job (spu train), 8 x 128 tokens a step, {cpu_name()} ({kind()})")
    for name, way in ways.items():
        rate = 8 * 128 / statistics.median(turn[name] for turn in turns)
        GOALS.note(f"{name} ({way.what}), tokens/s", f"{rate:.0f}")
    GOALS.note("  beside eight microbatches of 128 tokens", f"{ratio('eight microbatches, 1f1b'):.2f}x")
    MUST_REACH.add("main job (fp16, two stages), beside --reference", ratio("--reference"))
    MUST_REACH.add("two stages, beside one stage with two threads, planner's choice", ratio("one stage, all cores"))
