"""One way to train the main job: ``python job_peers.py reference|pipeline|replicas [name=value ...]``.

Does a step of ``spu train`` (with these settings), or of its ``--reference``, for every number of steps that comes in,
and prints their seconds, so that the ways can take turns. The first line says how the batch is cut. ``replicas``: what
``torchrun --nproc-per-node 2 -m spu train --replicas 2`` does; the others are one process.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ports import free_port

from spu.train import loop, plain
from spu.train.adapter import make_trained_model
from spu.train.config import TrainConfig
from spu.train.defaults import with_defaults
from spu.train.job import Job
from spu.train.run_folder import RunFolder


def pipeline(job: Job) -> tuple[str, Callable[[int], object]]:
    """Return what it is, and a function that does one step."""
    config = job.config
    if config.engine == "distributed":
        trainer = loop.pipeline(config, make_trained_model(config), None, config.lr_factor)
        trainer.prepare(*job.corpus.batch(config.seed, 0, config.batch, config.seq))
    else:
        trainer = loop.make_trainer(job, make_trained_model(config))
    assert trainer.plan is not None
    settings = trainer.plan.settings

    def step(index: int) -> float:
        return trainer.step(*job.corpus.batch(config.seed, index, config.batch, config.seq)).loss

    stages, replicas = len(trainer.plan.stages), config.replicas
    each = f", {replicas} processes" if replicas > 1 else ""
    return f"{settings.schedule}, {stages} stages, {settings.microbatches} microbatches{each}", step


def reference(job: Job) -> tuple[str, Callable[[int], object]]:
    """Return what it is, and a function that does one step."""
    model = make_trained_model(job.config)
    optimizer = plain.make_optimizer(model, job.config)
    return f"fp32, {torch.get_num_threads()} threads", lambda index: plain.train_step(
        model, optimizer, job.config, job.corpus, index
    )


def second_rank() -> subprocess.Popen[str] | None:
    """Make this process the first of two, as torchrun does, and start the second; None in that one."""
    if "RANK" in os.environ:
        return None
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    os.environ.update(OMP_NUM_THREADS="1", TORCHELASTIC_RUN_ID="none")
    torch.set_num_threads(1)
    second = {**os.environ, "RANK": "1", "LOCAL_RANK": "1"}
    return subprocess.Popen(
        [sys.executable, *sys.argv], env=second, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def main() -> None:
    kind, *given = sys.argv[1:]
    second = second_rank() if kind == "replicas" else None
    if kind == "replicas":
        given = ["engine=distributed", "replicas=2", *given]
    names = dict(part.split("=") for part in given)
    own = {name: int(value) if value.isdigit() else value for name, value in names.items()}
    with tempfile.TemporaryDirectory() as folder:
        job = Job(TrainConfig(**with_defaults({"steps": 1_000_000, **own})), RunFolder(Path(folder) / "run"), new=True)
        job.say = lambda text: print(text, file=sys.stderr)  # type: ignore[method-assign]
        job.read()
        what, step = (reference if kind == "reference" else pipeline)(job)
    print(what, flush=True)
    done = 0
    for line in sys.stdin:
        if second is not None:
            assert second.stdin is not None
            second.stdin.write(line)
            second.stdin.flush()
        seconds = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            step(done)
            seconds.append(time.perf_counter() - begin)
            done += 1
        print(statistics.median(seconds), flush=True)


if __name__ == "__main__":
    main()
