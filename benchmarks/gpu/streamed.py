"""A decoder whose training state does not fit 8 GB, on a GPU that may use 8 GB: what a step takes, and what it should.

    python benchmarks/gpu/streamed.py CASE --json FILE [--dry] [--reference FILE]

``resident`` runs without the limit and without streaming, for the losses. The other cases stream under the limit, which
torch's allocator enforces. Each prints predicted beside measured and compares its losses with those of ``--reference``:
the host's update and the GPU's round differently, so they are close, not equal. ``--dry`` runs a small model on the
CPU, from a disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from card_memory import card_memory

from spu import DeviceManager, ModelParallelTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from small_ram import STATE_BYTES, config, parameters

LIMIT_BYTES = 8 << 30
CASES: dict[str, dict[str, Any]] = {
    "resident": {"residency": "resident"},
    "streamed": {"residency": "streamed"},
    "streamed-compact": {"residency": "streamed", "state": "compact", "activations": "int8"},
    "offloaded": {"residency": "offloaded"},
    "disk": {"residency": "streamed"},
}
STEPS, ROWS, TOKENS = 6, 16, 1024
LARGEST_DIFFERENCE = 0.01  # of a loss; a weight that comes too late, or stale, costs more than its rounding


def model(shape: dict[str, Any]) -> Any:
    """Return a decoder with random weights of a fixed seed, made layer by layer on the CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    kind = shape.pop("model_type")
    shape.pop("architectures")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))


def batches(rows: int, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches that can be learnt: every sequence counts up from a random number."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, 256, (STEPS, rows, 1), generator=generator)
    ids = (starts + torch.arange(tokens + 1)) % 256
    return [(each[:, :-1], each[:, 1:]) for each in ids]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    shape = config(128, 3) if options.dry else config(2048, 16)
    rows, tokens = (4, 32) if options.dry else (ROWS, TOKENS)
    with tempfile.TemporaryDirectory(dir=options.json.parent, prefix="tier-") as folder:
        result = run(options.case, shape, rows, tokens, folder, options.dry)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if options.reference is None or not options.reference.exists():
        return 0
    wanted = json.loads(options.reference.read_text())["losses"]
    apart = max(abs(a - b) for a, b in zip(result["losses"], wanted, strict=True))
    print(f"losses differ from those of {options.reference} by at most {apart:.2e}")
    return int(not apart <= LARGEST_DIFFERENCE)


def run(case: str, shape: dict[str, Any], rows: int, tokens: int, folder: str, dry: bool) -> dict[str, Any]:
    """Train, and return what was measured and predicted."""
    count, device = parameters(shape), "cpu" if dry else "cuda:0"
    limited = case != "resident" and not dry
    if limited:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT_BYTES / whole), 0)
    tiers = f"cpu=6GB,disk={folder}:60GB" if case == "disk" or dry else "cpu=32GB"
    trainer = ModelParallelTrainer(
        model(dict(shape)),
        # A tenth of the limit is left to the allocator's gaps and to what kernels take.
        DeviceManager("cuda:0=7.2GB" if limited else None).get_devices(device),
        tiers=None if case == "resident" else tiers,
        precision="fp32" if dry else "fp16",
        microbatches=4,
        lr=1e-3,
        max_grad_norm=1.0,
        **CASES[case],
    )
    losses, seconds = [], []
    for x, y in batches(rows, tokens):
        begin = time.perf_counter()
        losses.append(float(trainer.step(x, y).loss))  # waits for the device
        seconds.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    if case != "resident":
        trainer.flush()
    print(trainer.compare())
    plan = trainer.plan
    assert plan is not None
    result = {
        "case": case,
        "device": "cpu" if dry else torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "parameters": count,
        "state_bytes": count * STATE_BYTES,
        "limit_bytes": LIMIT_BYTES if limited else None,
        **({} if dry else card_memory()),
        "predicted_peak_bytes": plan.predicted.peak_bytes[0],
        "predicted_step_s": plan.predicted.step_s,
        "step_s": sorted(seconds[2:])[len(seconds[2:]) // 2],  # the first two take the memory
        "flush_s": time.perf_counter() - begin,
        "tokens_per_step": rows * tokens,
        "bottleneck": None if plan.streaming is None else plan.streaming.bottleneck,
        "losses": losses,
    }
    trainer.close()
    return result


if __name__ == "__main__":
    sys.exit(main())
