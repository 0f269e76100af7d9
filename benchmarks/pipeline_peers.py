"""Peers of the pipeline benchmark, each a process of its own: ``python pipeline_peers.py PEER DTYPE [RANK PORT]``.

Runs a step for every line on its standard input and prints the step's seconds, so that peers can take turns. Peers:
``one-core``, ``two-threads``, ``torch-pipelining`` (1F1B, two ranks of one thread each over gloo; the second rank
follows the first), ``gpipe`` (torchgpipe with two CPU stages, or where that is not installed its way of working).
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pipeline_model as lm
import torch
from torch import nn


def serve(step: Callable[[], Any]) -> None:
    """A step for every line that comes in."""
    for _ in sys.stdin:
        begin = time.perf_counter()
        step()
        print(time.perf_counter() - begin, flush=True)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def one_process(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    model = nn.Sequential(*lm.make_layers()).to(dtype)
    optimizer = adamw(model)
    x, y = lm.make_batch()

    def step() -> None:
        optimizer.zero_grad()
        lm.plain_pass(model, x, y)
        optimizer.step()

    serve(step)


class FillDrain(nn.Module):
    """torchgpipe's way on CPUs: a thread for each partition runs forwards, and one backward goes through all of it."""

    def __init__(self, partitions: list[nn.Module]) -> None:
        super().__init__()
        self.partitions = nn.ModuleList(partitions)
        self._workers = [ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) for _ in partitions]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for part in x.tensor_split(lm.MICROBATCHES):
            run = None
            for worker, partition in zip(self._workers, self.partitions):
                run = worker.submit(self._run, partition, part if run is None else run)
            outputs.append(run)
        return torch.cat([run.result() for run in outputs])

    @staticmethod
    def _run(partition: nn.Module, x: Any) -> torch.Tensor:
        return partition(x if isinstance(x, torch.Tensor) else x.result())


def gpipe(dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    layers = lm.make_layers()
    if importlib.util.find_spec("torchgpipe") is None:
        model: nn.Module = FillDrain([nn.Sequential(*layers[:5]), nn.Sequential(*layers[5:])]).to(dtype)
    else:
        from torchgpipe import GPipe

        model = GPipe(
            nn.Sequential(*layers).to(dtype),
            balance=[5, 5], devices=["cpu", "cpu"], chunks=lm.MICROBATCHES, checkpoint="never",
        )  # fmt: skip
    optimizer = adamw(model)
    x, y = lm.make_batch()

    def step() -> None:
        optimizer.zero_grad()
        lm.loss_fn(model(x), y).backward()
        optimizer.step()

    serve(step)


def torch_pipelining(rank: int, dtype: torch.dtype, port: int) -> None:
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    layers = lm.make_layers()
    part = nn.Sequential(*(layers[:5] if rank == 0 else layers[5:])).to(dtype)
    rows = lm.ROWS // lm.MICROBATCHES
    tokens = torch.zeros(rows, lm.LENGTH, dtype=torch.long)
    hidden = torch.zeros(rows, lm.LENGTH, lm.WIDTH, dtype=dtype, requires_grad=True)
    stage = PipelineStage(part, rank, 2, torch.device("cpu"), input_args=(tokens if rank == 0 else hidden,))
    schedule = Schedule1F1B(stage, lm.MICROBATCHES, loss_fn=lm.loss_fn)
    optimizer = adamw(part)
    x, y = lm.make_batch()

    def step() -> None:
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, losses=[])
        optimizer.step()
        dist.barrier()

    if rank == 0:
        serve(step)
        return
    while True:  # until it is killed
        step()


def main() -> None:
    peer, dtype = sys.argv[1], lm.DTYPES[sys.argv[2]]
    if peer == "gpipe":
        gpipe(dtype)
    elif peer == "torch-pipelining":
        torch_pipelining(int(sys.argv[3]), dtype, int(sys.argv[4]))
    else:
        one_process(dtype, {"one-core": 1, "two-threads": 2}[peer])


if __name__ == "__main__":
    main()
