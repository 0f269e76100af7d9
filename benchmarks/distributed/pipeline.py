"""Two ranks, a stage each: spu beside torch.distributed.pipelining driven plainly, on loopback and on slower links.

    python benchmarks/distributed/pipeline.py [--job main] [--mbit 0,1000,100] [--schedule 1f1b,zb] [--transfer int8]

The peer has the same cut, the same stage modules on the same kernels (`spu.accelerate`), schedule, microbatches and
optimizer; its activations and gradients cross as they are. Both live in the same two processes and take turns, so that
a machine that slows down slows both. What is printed is the median, over the turns, of the peer's time over spu's.
``--mbit 0`` is loopback as it is; other rates need root (see launch.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from jobs import Block, Job, batch, cut, layers, loss_fn, sizes
from launch import between, cpu, judged, ranks
from torch import nn
from torch.distributed import pipelining

import spu
from spu import LossScaler, ModelParallelTrainer, ops
from spu.distributed.engine import SCHEDULES
from spu.engine.build import to_precision
from spu.model.layers import Layer

TARGETS = {0.0: 1.05, 1000.0: 1.2, 100.0: 1.8}
LR = 1e-3
SCALE = {"init_scale": 1024.0, "growth_interval": 10**6}  # of fp16 losses: never changes here, so no step is left out


class FusedBlock(Block):
    """The same block by spu's ops; attention in fp32 is torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, width // self.heads)
        x = x + self.out(ops.attention(*qkv.unbind(2), causal=True).flatten(2))
        return x + ops.gated_mlp(self.norm2(x), self.gate.weight, self.up.weight, self.down.weight)


def fused(job: Job) -> list[nn.Module]:
    """Return the layers on spu's kernels, in fp32 too."""
    made = layers(job)
    for layer in made:
        if isinstance(layer, Block):
            layer.__class__ = FusedBlock
        spu.accelerate(layer)
    return made


class Peer:
    """A stage of torch.distributed.pipelining, its optimizer, and in fp16 a scaler."""

    def __init__(self, job: Job, schedule: str, end: int, rank: int) -> None:
        made = fused(job)
        if job.precision != "fp32":
            to_precision([Layer(str(k), module) for k, module in enumerate(made)], job.precision)
        self.part, self.rank = cut(made, end, rank), rank
        dtype = next(p.dtype for p in made[1].parameters() if p.dim() == 2)
        rows = job.rows // job.microbatches
        tokens = torch.zeros(rows, job.length, dtype=torch.long)
        hidden = torch.zeros(rows, job.length, job.width, dtype=dtype, requires_grad=True)
        logits = torch.zeros(rows, job.length, job.vocabulary, dtype=dtype, requires_grad=True)
        stage = pipelining.PipelineStage(
            self.part,
            rank,
            2,
            torch.device("cpu"),
            input_args=tokens if rank == 0 else hidden,
            output_args=hidden if rank == 0 else logits,
        )
        stages = stage if schedule in ("gpipe", "1f1b") else [stage]
        self.schedule = getattr(pipelining, SCHEDULES[schedule])(stages, job.microbatches, loss_fn=self.loss)
        self.optimizer = spu.optim.AdamW(self.part.parameters(), lr=LR)
        self.scaler = spu.GradScaler("cpu", enabled=job.precision == "fp16", **SCALE)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.scaler.scale(loss_fn(outputs, targets))

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        losses: list[torch.Tensor] = []
        if self.rank == 0:
            self.scaler.scale(torch.zeros(()))  # makes its scale
            self.schedule.step(x)
        else:
            self.schedule.step(target=y, losses=losses, return_outputs=False)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        scale = self.scaler.get_scale()
        return sum(loss.item() for loss in losses) / max(1, len(losses)) / scale


class Ours:
    """The trainer, whose planner chooses the cut."""

    def __init__(self, job: Job, schedule: str, transfer: str) -> None:
        self.trainer = ModelParallelTrainer(
            nn.Sequential(*fused(job)),
            engine="distributed",
            precision=job.precision,
            microbatches=job.microbatches,
            schedule=schedule,
            transfer=transfer,
            loss_fn=loss_fn,
            scaler=LossScaler(enabled=job.precision == "fp16", **SCALE),
            optimizer=lambda parameters: spu.optim.AdamW(parameters, lr=LR),
        )
        self.trainer.prepare(*batch(job, 0))

    @property
    def end(self) -> int:
        assert self.trainer.plan is not None
        return self.trainer.plan.stages[0].layers[1]

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        return self.trainer.step(x, y).loss


def timed(who: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float, float]:
    """Return the seconds of a step that all ranks begin together and have all ended, those that this rank's processor
    has worked, and the loss.
    """
    dist.barrier()
    begin, worked = time.perf_counter(), time.process_time()
    loss = who.step(x, y)
    worked = time.process_time() - worked
    dist.barrier()
    return time.perf_counter() - begin, worked, loss


def rate() -> float:
    """Return megabits a second, one way, of 8 MB through the process group."""
    message = torch.zeros(2**21)
    dist.barrier()
    begin = time.perf_counter()
    dist.send(message, 1) if dist.get_rank() == 0 else dist.recv(message, 0)
    dist.barrier()
    return 8 * message.numel() * 4 / (time.perf_counter() - begin) / 1e6


def turns(job: Job, schedule: str, transfer: str, count: int) -> Iterator[dict[str, Any]]:
    """Run in each rank; yield what was measured, for rank 0 to print."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ours = Ours(job, schedule, transfer)
    peer = Peer(job, schedule, ours.end, rank)
    yield {"rate": rate(), "end": ours.end}
    for step in range(count + 2):
        given = batch(job, step)
        pair: list[Any] = [("ours", ours), ("peer", peer)]
        taken = {name: timed(who, *given) for name, who in pair[:: 1 if step % 2 else -1]}
        loss = torch.tensor(taken["peer"][2])
        dist.broadcast(loss, 1)
        worked = torch.tensor([taken[name][1] for name in ("ours", "peer")])
        dist.all_reduce(worked)
        if step >= 2:
            yield {
                "ours": taken["ours"][0],
                "peer": taken["peer"][0],
                "worked": worked.tolist(),
                "apart": abs(taken["ours"][2] - loss.item()) / loss.item(),
            }
    sent = ours.trainer._runner.engine.sent_bytes() if ours.trainer._runner is not None else 0
    yield {"sent": sent / (count + 2)}
    ours.trainer.close()
    dist.destroy_process_group()


def report(job: Job, schedule: str, transfer: str, mbit: float, count: int, target: float | None) -> bool:
    """Measure one row and print it; return whether it reaches its target."""
    options = ["--job", json.dumps(vars(job)), "--schedule", schedule, "--transfer", transfer, "--turns", str(count)]
    with between(mbit or None) as places:
        head, *rows, tail = ranks("pipeline.py", options, places, timeout_s=300)
    ratio = statistics.median(row["peer"] / row["ours"] for row in rows)
    best = min(row["peer"] for row in rows) / min(row["ours"] for row in rows)
    worked = [1e3 * statistics.median(row["worked"][k] for row in rows) for k in range(2)]
    ms = {name: 1e3 * statistics.median(row[name] for row in rows) for name in ("ours", "peer")}
    print(
        f"{'loopback' if not mbit else f'{mbit:g} Mbit/s':>11} {job.precision} {schedule} transfer {transfer:5} "
        f"ours {ms['ours']:7.1f} ms, peer {ms['peer']:7.1f} ms: {judged(ratio, target)}; "
        f"of the best steps {best:.2f}x; processors' time {worked[0]:.0f} and {worked[1]:.0f} ms; "
        f"rank 0 sends {tail['sent'] / 1e3:.0f} kB a step; losses apart by {max(row['apart'] for row in rows):.1e}; "
        f"link {head['rate']:.0f} Mbit/s",
        flush=True,
    )
    return target is None or ratio >= target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", default="0,1000,100")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--schedule", default="1f1b,zb")
    parser.add_argument("--transfer", default="none,int8")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--rank", action="store_true", help="(this is one of the two)")
    parser.add_argument("--job", type=sizes, default="main", help="a name (main, thin, wire, bulk), or sizes as JSON")
    given = parser.parse_args()
    if given.rank:
        for row in turns(Job(**given.job), given.schedule, given.transfer, given.turns):
            if os.environ["RANK"] == "0":
                print(json.dumps(row), flush=True)
        return
    print(f"{cpu()}; torch {torch.__version__}; {Job(**given.job)}", flush=True)
    good = True
    each = (given.mbit, given.precision, given.schedule, given.transfer)
    for mbit, precision, schedule, transfer in itertools.product(*(text.split(",") for text in each)):
        job = Job(**given.job | {"precision": precision})
        try:
            good &= report(job, schedule, transfer, float(mbit), given.turns, TARGETS.get(float(mbit)))
        except OSError as error:
            print(f"{mbit} Mbit/s was not measured: {error}", flush=True)
            good = False
    sys.exit(not good)


if __name__ == "__main__":
    main()
