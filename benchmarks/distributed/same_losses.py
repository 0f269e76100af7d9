"""The same losses whatever runs the stages, and whatever a checkpoint came from: 200 steps, and resumes in other forms.

    python benchmarks/distributed/same_losses.py [--steps 200] [--precision fp32,fp16] [--part forms,resumes] [--tied]

A form is the number of stages ("2 local": threads of one process; "2 ranks": processes) or, for "2 x 2 ranks", two
pipelines of two. Losses have to be equal bit for bit where sums have the same order. Two pipelines add gradients in
another order: there the bound is twice the difference that one process has from itself when it takes the microbatches
in reverse order. With --tied the head's weight is the embedding's: stages add up its gradients apart, so that processes
have to be equal to as many stages of one process, and these are within the bound of one stage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jobs import Job, batch, layers, loss_fn
from launch import between, cpu, ranks
from torch import nn

import spu
from spu import DeviceManager, ModelParallelTrainer

SIZES = {"width": 48, "blocks": 4, "rows": 8, "length": 16, "microbatches": 8, "vocabulary": 64}
FORMS = {
    "1 process": (1, 1, "local"),
    "2 local": (2, 1, "local"),
    "3 local": (3, 1, "local"),
    "4 local": (4, 1, "local"),
    "2 ranks": (2, 1, "distributed"),
    "4 ranks": (4, 1, "distributed"),
    "2 x 2 ranks": (2, 2, "distributed"),
}
LIKE = {"2 ranks": "2 local", "4 ranks": "4 local", "2 x 2 ranks": "2 local"}  # with a tied weight
RESUMES = [["1 process", "3 local", "2 local"], ["2 ranks", "1 process", "4 ranks"], ["2 x 2 ranks", "1 process"]]


def train(given: argparse.Namespace) -> None:
    """Run steps in this process, one rank or the only one; rank 0 prints the loss of each."""
    torch.set_num_threads(1)
    stages, replicas, engine = FORMS[given.form]
    job = Job(**SIZES | {"precision": given.precision})
    settings: dict[str, Any] = {"engine": engine, "schedule": "gpipe" if given.form == "1 process" else "1f1b"}
    if engine == "local":
        own = DeviceManager().get_devices(["cpu"] * stages)
        settings["devices"] = [dataclasses.replace(device, threads=1) for device in own]
    else:
        dist.init_process_group("gloo")
        settings["replicas"] = replicas
    with ModelParallelTrainer(
        _model(job, tied=given.tied),
        precision=job.precision,
        microbatches=job.microbatches // replicas,
        loss_fn=loss_fn,
        max_grad_norm=1.0,
        optimizer=lambda parameters: spu.optim.AdamW(parameters, lr=3e-3),
        **settings,
    ) as trainer:
        trainer.prepare(*batch(job, 0))
        if given.load:
            trainer.load(given.load)
        for step in range(given.first, given.last):
            x, y = (tensor.flip(0) if given.reverse else tensor for tensor in batch(job, step))
            loss = trainer.step(x, y).loss
            if os.environ["RANK"] == "0":
                print(json.dumps({"loss": loss.hex()}), flush=True)
        if given.save:
            trainer.save(given.save)
    if dist.is_initialized():
        dist.destroy_process_group()


def _model(job: Job, *, tied: bool) -> nn.Sequential:
    model = nn.Sequential(*layers(job))
    if tied:
        model[-1][-1].weight = model[0].weight
    return model


def losses(form: str, precision: str, first: int, last: int, **more: Any) -> list[float]:
    """Return the losses of a form's steps."""
    options = ["--form", form, "--precision", precision, "--first", str(first), "--last", str(last)]
    for name, value in more.items():
        options += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    stages, replicas, engine = FORMS[form]
    with between(None) as places:
        count = stages * replicas if engine == "distributed" else 1
        rows = ranks("same_losses.py", options, (places * 2)[:count], timeout_s=600)
    return [float.fromhex(row["loss"]) for row in rows]


def furthest(ours: list[float], other: list[float]) -> tuple[float, int]:
    """Return the largest difference of two lists of losses, and after how many equal ones they first differ."""
    assert len(ours) == len(other)
    apart = [abs(a - b) for a, b in zip(ours, other)]
    return max(apart), next((k for k, distance in enumerate(apart) if distance), len(apart))


def told(name: str, ours: list[float], other: list[float], bound: float, every: int) -> bool:
    """Print how far two lists are apart, also for every so many steps; return whether that is allowed."""
    most, same = furthest(ours, other)
    apart = [abs(a - b) for a, b in zip(ours, other)]
    parts = [max(apart[k : k + every]) for k in range(0, len(apart), every)]
    good = most <= bound
    what = "equal bit for bit" if most == 0 else f"equal for {same} steps, then apart by up to {most:.1e}"
    wanted = "0" if bound == 0 else f"<= {bound:.1e}"
    print(f"  {name:32} {len(ours)} steps: {what} (target {wanted}: {'reached' if good else 'MISSED'})", flush=True)
    if most:
        print("    largest in each " + f"{every} steps: " + " ".join(f"{part:.0e}" for part in parts), flush=True)
    return good


def bound_of(whole: list[float], precision: str, steps: int, **more: Any) -> float:
    """Return twice what one process is apart from itself where it adds microbatches in the other order."""
    own, _ = furthest(losses("1 process", precision, 0, steps, reverse=True, **more), whole)
    return 2 * own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--precision", default="fp32,fp16")
    parser.add_argument("--part", default="forms,resumes")
    parser.add_argument("--tied", action="store_true", help="the head's weight is the embedding's")
    parser.add_argument("--rank", action="store_true", help="(this is one of the processes; so are the next ones)")
    parser.add_argument("--form", choices=list(FORMS))
    parser.add_argument("--reverse", action="store_true")
    parser.add_argument("--load")
    parser.add_argument("--save")
    parser.add_argument("--first", type=int)
    parser.add_argument("--last", type=int)
    given = parser.parse_args()
    if given.rank:
        train(given)
        return
    good, steps, more = True, given.steps, {"tied": True} if given.tied else {}
    print(f"{cpu()}; torch {torch.__version__}; {Job(**SIZES)}; each beside one process", flush=True)
    for precision in given.precision.split(","):
        known = {"1 process": losses("1 process", precision, 0, steps, **more)}
        whole = known["1 process"]
        bound = bound_of(whole, precision, steps, **more)
        ends = f"{whole[0]:.4f} -> {whole[-1]:.4f}"
        print(f"{precision}: loss {ends}; the other order of sums: {bound / 2:.1e}", flush=True)
        for form in FORMS if "forms" in given.part else ():
            if form == "1 process":
                continue
            like = LIKE.get(form, "1 process") if given.tied else "1 process"
            allowed = bound if FORMS[form][1] > 1 or (given.tied and form not in LIKE) else 0.0
            known[form] = losses(form, precision, 0, steps, **more)
            name = form if like == "1 process" else f"{form} (as {like})"
            good &= told(name, known[form], known[like], allowed, max(1, steps // 10))
        for chain in RESUMES if "resumes" in given.part else ():
            with tempfile.TemporaryDirectory() as folder:
                found: list[float] = []
                for number, form in enumerate(chain):
                    span = [steps * k // len(chain) for k in (number, number + 1)]
                    load = {"load": str(Path(folder) / str(number))} if number else {}
                    found += losses(form, precision, *span, save=str(Path(folder) / str(number + 1)), **load, **more)
            allowed = bound if given.tied or any(FORMS[form][1] > 1 for form in chain) else 0.0
            good &= told(" -> ".join(chain), found, whole, allowed, max(1, steps // 10))
    sys.exit(not good)


if __name__ == "__main__":
    main()
