"""The lease's training parts: a 200M decoder on the card beside plain torch, and on card and CPU as two stages.

    python benchmarks/gpu/lease_train.py train|mixed [--dry]

Results are printed as JSON lines, marked for the lease's frame (``lease_lines``).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lease_lines import emit
from lease_work import batches, decoder
from torch import Tensor, nn

from spu import ModelParallelTrainer

ROWS, TOKENS, MICROBATCHES, STEPS = 8, 1024, 4, 12
SHAPE = {"vocabulary": 32000, "width": 1024, "inner": 2816, "layers": 12, "heads": 16, "kv_heads": 8}  # 207M
SMALL = {"vocabulary": 64, "width": 32, "inner": 48, "layers": 2, "heads": 2, "kv_heads": 1}
LARGEST_DIFFERENCE = 0.02  # of a loss, between places that round differently; a lost gradient costs more within 6 steps


def trainer_of(devices: list[str], shape: dict[str, int], precision: str = "fp16") -> ModelParallelTrainer:
    return ModelParallelTrainer(
        decoder(**shape), devices, lr=1e-3, precision=precision, microbatches=MICROBATCHES, max_grad_norm=1.0
    )


def recorded_step(small: bool) -> None:
    """Run a step whose kernels are recorded: one layer and two microbatches of the size that the lease's steps have."""
    import spu.ops

    shape = {**(SMALL if small else SHAPE), "layers": 1}
    rows, tokens = (4, 16) if small else (ROWS, TOKENS)
    with spu.ops.use_backend("triton"):
        trainer = trainer_of(["cpu"], shape)
        x, y = batches(1, rows, tokens, shape["vocabulary"])[0]
        trainer.step(x, y)
        trainer.close()


def _timed(steps: list[tuple[Tensor, Tensor]], step: Any, card: bool) -> tuple[list[float], float]:
    """Return the losses and the seconds of a step: the host waits once, after the last. The first three warm up."""
    losses, warm = [], min(3, len(steps) - 1)
    for x, y in steps[:warm]:
        losses.append(step(x, y))
    if card:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for x, y in steps[warm:]:
        losses.append(step(x, y))
    if card:
        torch.cuda.synchronize()
    return [float(loss) for loss in losses], (time.perf_counter() - began) / (len(steps) - warm)


def plain(shape: dict[str, int], data: list[tuple[Tensor, Tensor]], device: str) -> tuple[list[float], float]:
    """The same model and steps in plain torch: autocast, GradScaler, fused AdamW."""
    model: nn.Module = decoder(**shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler(device)

    def step(x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros((), device=device)
        x, y = x.to(device), y.to(device)
        for part, target in zip(x.chunk(MICROBATCHES), y.chunk(MICROBATCHES)):
            with torch.autocast(device, torch.float16):
                logits = model(input_ids=part, use_cache=False).logits
                loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), target.flatten()) / MICROBATCHES
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return total

    return _timed(data, step, device == "cuda")


def _waits(trainer: ModelParallelTrainer, batch: tuple[Tensor, Tensor]) -> None:
    """Count the host's waits in a step, by torch's own debug mode, and name them."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = trainer.step(*batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in said if "synchroniz" in str(w.message)})
    count = sum("synchroniz" in str(w.message) for w in said)
    emit({"what": "host waits in a step", "count": count, "places": places, "loss": float(result.loss)})


def _profiled(trainer: ModelParallelTrainer, batch: tuple[Tensor, Tensor]) -> None:
    """Keep the trace of one step, and what took the device's time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        trainer.step(*batch)
        torch.cuda.synchronize()
    top = sorted(found.key_averages(), key=lambda one: -one.self_device_time_total)[:25]
    rows = [{"name": one.key[:80], "us": one.self_device_time_total, "calls": one.count} for one in top]
    emit({"what": "device time of a step", "rows": rows})
    if out := os.environ.get("SPU_LEASE_OUT"):
        found.export_chrome_trace(str(Path(out) / "trace.json.gz"))


def train(dry: bool) -> int:
    """The decoder's step beside plain torch's."""
    device, shape = ("cpu", SMALL) if dry else ("cuda", SHAPE)
    rows, tokens, steps = (4, 16, 2) if dry else (ROWS, TOKENS, STEPS)
    data = batches(steps + 2, rows, tokens, shape["vocabulary"])
    trainer = trainer_of(["cpu" if dry else "cuda:0"], shape)
    losses, took = _timed(data[:steps], lambda x, y: trainer.step(x, y).loss, not dry)
    row = {"what": "train", "by": "spu", "step_s": took, "tokens_per_s": rows * tokens / took, "losses": losses}
    if not dry:
        row["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
    emit(row)
    if not dry:
        _waits(trainer, data[-1])
        _profiled(trainer, data[-2])
    trainer.close()
    if not dry:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    theirs, peer = plain(shape, data[:steps], device)
    row = {
        "what": "train",
        "by": "torch autocast",
        "step_s": peer,
        "tokens_per_s": rows * tokens / peer,
        "losses": theirs,
    }
    emit(row if dry else {**row, "peak_mib": torch.cuda.max_memory_allocated() >> 20})
    return _compared("train", losses, theirs, {"ratio": peer / took})


def mixed(dry: bool) -> int:
    """Six steps on the card and the CPU as two stages, beside the card alone: the same losses."""
    shape = SMALL if dry else SHAPE
    rows, tokens, steps = (4, 16, 2) if dry else (ROWS, TOKENS, 6)
    data, found = batches(steps, rows, tokens, shape["vocabulary"]), []
    for devices in (["cpu"], ["cpu:0", "cpu:1"]) if dry else (["cuda:0"], ["cuda:0", "cpu"]):
        trainer = trainer_of(list(devices), shape)
        losses, took = _timed(data, lambda x, y, t=trainer: t.step(x, y).loss, not dry)
        emit({"what": "mixed", "devices": devices, "step_s": took, "losses": losses})
        trainer.close()
        found.append(losses)
    return _compared("mixed", found[0], found[1], {})


def _compared(what: str, ours: list[float], theirs: list[float], more: dict[str, float]) -> int:
    apart = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs))
    emit({"what": what, "losses_differ_by": apart, "allowed": LARGEST_DIFFERENCE, **more})
    return int(not apart <= LARGEST_DIFFERENCE)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a small decoder on the card.")
    parser.add_argument("part", choices=("train", "mixed"))
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    return {"train": train, "mixed": mixed}[options.part](options.dry)


if __name__ == "__main__":
    sys.exit(main())
