"""Two ranks with the whole model each: spu's replicas beside DistributedDataParallel, step for step in turns.

    python benchmarks/distributed/data_parallel.py [--precision fp32,fp16] [--mbit 0]

Both have the same modules, optimizer (`spu.optim.AdamW`) and microbatches, and add gradients up once a step, in fp32.
In fp16 DistributedDataParallel is asked too, with main gradients as spu keeps them (`param.grad_dtype`), and its answer
is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from jobs import Job, batch, layers, loss_fn, sizes
from launch import between, cpu, judged, ranks
from pipeline import LR, SCALE, timed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import spu
from spu import LossScaler, ModelParallelTrainer

TARGET = 1.0  # in fp32


class Peer:
    """DistributedDataParallel over a whole model; microbatches before the last one do not reduce."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = DistributedDataParallel(nn.Sequential(*layers(job)), gradient_as_bucket_view=True)
        self.optimizer = spu.optim.AdamW(self.model.parameters(), lr=LR)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        parts, rank = self.job.microbatches, dist.get_rank()
        own = slice(rank * parts, (rank + 1) * parts)
        pieces = [tensor.tensor_split(2 * parts)[own] for tensor in (x, y)]
        total = torch.zeros(())
        for index, (part_x, part_y) in enumerate(zip(*pieces)):
            self.model.require_backward_grad_sync = index == parts - 1
            loss = loss_fn(self.model(part_x), part_y) / parts  # DDP takes the mean over ranks
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.all_reduce(total)
        return total.item() / 2


class Ours:
    def __init__(self, job: Job) -> None:
        self.trainer = ModelParallelTrainer(
            nn.Sequential(*layers(job)),
            engine="distributed",
            replicas=2,
            precision=job.precision,
            microbatches=job.microbatches,
            schedule="1f1b",
            loss_fn=loss_fn,
            scaler=LossScaler(enabled=job.precision == "fp16", **SCALE),
            optimizer=lambda parameters: spu.optim.AdamW(parameters, lr=LR),
        )
        self.trainer.prepare(*batch(job, 0))

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        return self.trainer.step(x, y).loss


def answer_of_ddp(job: Job) -> str:
    """Return what DistributedDataParallel does with fp16 parameters whose gradients are fp32."""
    model = nn.Sequential(*layers(job)).half()
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    try:
        peer = DistributedDataParallel(model)
        x, y = batch(job, 0)
        loss_fn(peer(x[:1]), y[:1]).backward()
    except (RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return f"takes them; gradients are {next(model.parameters()).grad.dtype}"


def turns(job: Job, count: int) -> Iterator[dict[str, Any]]:
    """Run in each rank; yield what was measured, for rank 0 to print."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    contenders: dict[str, Any] = {"ours": Ours(job)}
    if job.precision == "fp32":
        contenders["peer"] = Peer(job)
    for step in range(count + 2):
        x, y = batch(job, step)
        order = list(contenders)[:: 1 if step % 2 else -1]
        taken = {name: timed(contenders[name], x, y) for name in order}
        if step >= 2:
            yield {name: taken[name][0] for name in order} | {"losses": {name: taken[name][2] for name in order}}
    contenders["ours"].trainer.close()
    if job.precision != "fp32":
        yield {"ddp": answer_of_ddp(job)}
    dist.barrier()
    dist.destroy_process_group()


def report(job: Job, mbit: float, count: int) -> bool:
    """Measure one row and print it; return whether it reaches its target."""
    with between(mbit or None) as places:
        rows = ranks("data_parallel.py", ["--job", json.dumps(vars(job)), "--turns", str(count)], places, timeout_s=300)
    head = f"{'loopback' if not mbit else f'{mbit:g} Mbit/s':>11} {job.precision}"
    steps = [row for row in rows if "ours" in row]
    ours = 1e3 * statistics.median(row["ours"] for row in steps)
    if job.precision != "fp32":
        losses = [row["losses"]["ours"] for row in steps]
        good = losses[-1] < losses[0]
        print(
            f"{head} ours {ours:7.1f} ms, loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(steps)} steps "
            f"(target: works, {'reached' if good else 'MISSED'}); DDP: {rows[-1]['ddp']}"
        )
        return good
    ratio = statistics.median(row["peer"] / row["ours"] for row in steps)
    best = min(row["peer"] for row in steps) / min(row["ours"] for row in steps)
    apart = max(abs(row["losses"]["ours"] - row["losses"]["peer"]) / row["losses"]["peer"] for row in steps)
    print(
        f"{head} ours {ours:7.1f} ms, DDP {1e3 * statistics.median(row['peer'] for row in steps):7.1f} ms: "
        f"{judged(ratio, TARGET)}; of the best steps {best:.2f}x; losses apart by {apart:.1e}",
        flush=True,
    )
    return ratio >= TARGET


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=0)
    parser.add_argument("--precision", default="fp32,fp16")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--rank", action="store_true", help="(this is one of the two)")
    parser.add_argument("--job", type=sizes, default="main", help="a name (main, thin), or sizes as JSON")
    given = parser.parse_args()
    job = {"microbatches": 2, **given.job}
    if given.rank:
        for row in turns(Job(**given.job), given.turns):
            if os.environ["RANK"] == "0":
                print(json.dumps(row), flush=True)
        return
    print(f"{cpu()}; torch {torch.__version__}; {Job(**job)} a rank", flush=True)
    good = [report(Job(**job | {"precision": name}), given.mbit, given.turns) for name in given.precision.split(",")]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
