"""What a run's loop takes beside its steps: batches, metrics, validations and checkpoints, as shares of the steps.

python benchmarks/loop_overhead.py [--steps N] [options of spu train]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from spu.cli.app import main
from spu.train.keep import Checkpoints
from spu.train.loop import Loop
from spu.trainer.trainer import ModelParallelTrainer


def timed(owner: type, name: str) -> list[float]:
    """Let a method append the seconds of each of its calls to the list that is returned."""
    seconds: list[float] = []
    method: Callable[..., Any] = getattr(owner, name)

    def wrapped(*args: Any, **keywords: Any) -> Any:
        begin = time.perf_counter()
        try:
            return method(*args, **keywords)
        finally:
            seconds.append(time.perf_counter() - begin)

    setattr(owner, name, wrapped)
    return seconds


def measure(arguments: list[str]) -> None:
    steps, whole = timed(ModelParallelTrainer, "step"), timed(Loop, "_train")
    validations, saves = timed(Loop, "_validate"), timed(Checkpoints, "save")
    with tempfile.TemporaryDirectory() as folder:
        try:
            main(["train", "--no-sample", "--out", folder, *arguments])
        except SystemExit as ended:
            if ended.code:
                raise
    step = statistics.median(steps)
    beside = statistics.median(a - b for a, b in zip(whole, steps, strict=True))
    print(f"a step {step * 1e3:.1f} ms; beside it batch, metrics, checks {beside * 1e3:.2f} ms ({beside / step:.2%})")
    for name, times in (("validation", validations), ("checkpoint", saves)):
        each = statistics.median(times)
        print(f"a {name} {each * 1e3:.0f} ms ({each / step:.1f} steps), {len(times)} of them")


if __name__ == "__main__":
    measure(sys.argv[1:] or ["--steps", "40"])
