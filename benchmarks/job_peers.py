"""One way to train the main job, a process of its own: ``python job_peers.py reference|pipeline [name=value ...]``.

Does a step of ``spu train`` (with these settings), or of its ``--reference``, for every number of steps that comes in,
and prints their seconds, so that the ways can take turns. The first line says how the batch is cut.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from spu.train import plain
from spu.train.adapter import make_trained_model
from spu.train.config import TrainConfig
from spu.train.defaults import with_defaults
from spu.train.job import Job
from spu.train.loop import make_trainer
from spu.train.run_folder import RunFolder


def pipeline(job: Job) -> tuple[str, Callable[[int], object]]:
    """Return what it is, and a function that does one step."""
    config = job.config
    trainer = make_trainer(job, make_trained_model(config))
    assert trainer.plan is not None
    settings = trainer.plan.settings

    def step(index: int) -> float:
        return trainer.step(*job.corpus.batch(config.seed, index, config.batch, config.seq)).loss

    stages = len(trainer.plan.stages)
    return f"{settings.schedule}, {stages} stages, {settings.microbatches} microbatches", step


def reference(job: Job) -> tuple[str, Callable[[int], object]]:
    """Return what it is, and a function that does one step."""
    model = make_trained_model(job.config)
    optimizer = plain.make_optimizer(model, job.config)
    return f"fp32, {torch.get_num_threads()} threads", lambda index: plain.train_step(
        model, optimizer, job.config, job.corpus, index
    )


def main() -> None:
    kind, *given = sys.argv[1:]
    names = dict(part.split("=") for part in given)
    own = {name: int(value) if value.isdigit() else value for name, value in names.items()}
    with tempfile.TemporaryDirectory() as folder:
        job = Job(TrainConfig(**with_defaults({"steps": 1_000_000, **own})), RunFolder(Path(folder) / "run"), new=True)
        job.say = lambda text: print(text, file=sys.stderr)  # type: ignore[method-assign]
        job.read()
        what, step = (pipeline if kind == "pipeline" else reference)(job)
    print(what, flush=True)
    done = 0
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            step(done)
            seconds.append(time.perf_counter() - begin)
            done += 1
        print(statistics.median(seconds), flush=True)


if __name__ == "__main__":
    main()
