"""AdamW's step in every form of its state, in processor time: what `test_optim_state.py` measures, on a busy machine.

    python benchmarks/optim_state.py [ROUNDS]

One thread. The peers take turns; the figures are the best and the median of each. A thread's processor time leaves out
what others had of its core, though not what they had of the memory's bandwidth.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import test_optim_state as peers

from spu.optim.forms import FORMS
from spu.plan.memory import STATE_BYTES

COPIED = 1 << 25  # fp32 values: past every cache


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    torch.set_num_threads(1)
    source, target = torch.ones(COPIED), torch.empty(COPIED)
    calls = {"copy": lambda: target.copy_(source), "torch fused": peers.torch_fused()}
    moved = {"copy": 8 * COPIED}
    for state in FORMS:
        for dtype in (torch.float16, torch.bfloat16):
            name = f"{state} {str(dtype).removeprefix('torch.')}"
            calls[name] = peers.ours(state, dtype)
            moved[name] = (4 + 2 * (sum(STATE_BYTES[state]) + 2)) * peers.PARAMETERS
    if importlib.util.find_spec("bitsandbytes"):
        calls["bitsandbytes"] = peers.bitsandbytes()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            seconds[name].append(time.thread_time() - start)
    for what, of in (("best", min), ("median", statistics.median)):
        took = {name: of(times[1:]) for name, times in seconds.items()}  # the first round warms up
        copying = moved["copy"] / took["copy"]
        print(f"{what} of {rounds}: copy {copying / 1e9:.1f} GB/s, torch fused {took['torch fused'] * 1e3:.1f} ms")
        for name in list(moved)[1:]:
            share, each = moved[name] / took[name] / copying, took[name] / peers.PARAMETERS * 1e9
            others = [f"{took[other] / took[name]:.2f}x {other}" for other in took if other not in moved]
            print(f"  {name:17} {each:5.2f} ns a parameter, {share:4.0%} of copying, {', '.join(others)}")


if __name__ == "__main__":
    main()
