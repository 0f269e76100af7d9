"""Peers of the pipeline benchmark, each run as a process of its own: ``python pipeline_peers.py PEER DTYPE STEPS``.

Prints one JSON line: seconds of each step, the first of which warms up. Peers: ``one-core``, ``two-threads``,
``torch-pipelining`` (1F1B, two ranks of one thread each over gloo), ``torchgpipe`` (two CPU stages).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import pipeline_model as lm
import torch
from torch import nn


def timed(step: Callable[[], Any], steps: int) -> list[float]:
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return seconds


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def one_process(dtype: torch.dtype, steps: int, threads: int) -> list[float]:
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    model = nn.Sequential(*lm.make_layers()).to(dtype)
    optimizer = adamw(model)
    x, y = lm.make_batch(dtype)

    def step() -> None:
        optimizer.zero_grad()
        lm.plain_pass(model, x, y)
        optimizer.step()

    return timed(step, steps)


def torchgpipe(dtype: torch.dtype, steps: int) -> list[float]:
    from torchgpipe import GPipe

    torch.set_num_threads(1)
    model = GPipe(
        nn.Sequential(*lm.make_layers()).to(dtype),
        balance=[5, 5], devices=["cpu", "cpu"], chunks=lm.MICROBATCHES, checkpoint="never",
    )  # fmt: skip
    optimizer = adamw(model)
    x, y = lm.make_batch(dtype)

    def step() -> None:
        optimizer.zero_grad()
        lm.loss_fn(model(x), y).backward()
        optimizer.step()

    return timed(step, steps)


def torch_pipelining(rank: int, dtype: torch.dtype, steps: int, port: int) -> list[float]:
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    layers = lm.make_layers()
    part = nn.Sequential(*(layers[:5] if rank == 0 else layers[5:])).to(dtype)
    rows = lm.ROWS // lm.MICROBATCHES
    length = lm.sequence_length(dtype)
    tokens = torch.zeros(rows, length, dtype=torch.long)
    hidden = torch.zeros(rows, length, lm.WIDTH, dtype=dtype, requires_grad=True)
    stage = PipelineStage(part, rank, 2, torch.device("cpu"), input_args=(tokens if rank == 0 else hidden,))
    schedule = Schedule1F1B(stage, lm.MICROBATCHES, loss_fn=lm.loss_fn)
    optimizer = adamw(part)
    x, y = lm.make_batch(dtype)

    def step() -> None:
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, losses=[])
        optimizer.step()
        dist.barrier()

    seconds = timed(step, steps)
    dist.destroy_process_group()
    return seconds


def main() -> None:
    peer, dtype, steps = sys.argv[1], lm.DTYPES[sys.argv[2]], int(sys.argv[3])
    if peer == "torchgpipe":
        seconds = torchgpipe(dtype, steps)
    elif peer == "torch-pipelining":
        rank, port = int(sys.argv[4]), int(sys.argv[5])
        seconds = torch_pipelining(rank, dtype, steps, port)
        if rank:
            return
    else:
        seconds = one_process(dtype, steps, {"one-core": 1, "two-threads": 2}[peer])
    print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
