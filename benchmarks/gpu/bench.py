"""Kernels and training steps of one card beside their peers; results as JSON and a markdown table.

    python benchmarks/gpu/bench.py [--out benchmarks/results] [--minutes 8] [--again] [--dry]

Rules: medians of rounds of a captured graph of 10 to 20 calls after a warm-up, so that small kernels are timed and not
Python (spu.tune.timing); what a call takes as Python makes it stands beside it ("eager"). Inputs are random and several
times the cache where bandwidth is asked for; peers run in the same process on the same values; each row is written as
it is measured. A second run on the same card, versions and month measures what is missing (``--again``: everything).
Shares are of the peaks measured first: a large device-to-device copy (bytes read and written) and an 8192-cube fp16
product by cuBLAS.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

if "--dry" in sys.argv:  # read when triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from cases import BARE, MEGATRON, STEP, Case, cases, on_card, rehearsal
from layer_cases import layer_cases

Row = dict[str, Any]
_SQUARE = "8192x8192x8192"


def peaks() -> dict[str, float]:
    """The card's ceilings: bytes/s of a copy, FLOP/s of cuBLAS."""
    from spu.tune.timing import measure_us

    device = torch.device("cuda")
    size = min(4 << 30, torch.cuda.mem_get_info()[0] // 4)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy_us = measure_us(lambda: target.copy_(source), device)
    a, b = (torch.randn(8192, 8192, device=device).half() for _ in range(2))
    product_us = measure_us(lambda: a @ b, device)
    return {"copy_bytes_per_s": 2e6 * size / copy_us, "product_flops": 1e6 * 2 * 8192**3 / product_us}


def _measure(case: Case, ceilings: dict[str, float]) -> Row:
    from spu.tune.run import context_is_gone
    from spu.tune.timing import Cuda, time_call

    row: Row = {"group": case.group, "shape": case.shape, "peer": case.peer}
    try:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        call = case.make()
        took = time_call(call, Cuda(torch.device("cuda")))
        row |= {"us": took.device_us, "eager_us": took.eager_us, "captured": took.captured}
        row["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
    except Exception as error:
        if context_is_gone(error, torch.device("cuda")):  # and with it every row after this one
            raise
        return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    per_s = 1e6 / row["us"]
    if case.flops:
        rate = case.flops * per_s
        return row | {"tflops": rate / 1e12, "share": rate / ceilings["product_flops"]}
    rate = case.moved * per_s
    return row | {"gb_per_s": rate / 1e9, "share": rate / ceilings["copy_bytes_per_s"]}


def targets(rows: list[Row]) -> list[str]:
    """What was aimed at, beside what came out; a line each, for what the rows allow to say."""
    took = {(row["group"], row["shape"], row["peer"]): row["us"] for row in rows if "us" in row}
    share = {(row["group"], row["peer"]): row["share"] for row in rows if "us" in row}

    def best(group: str, shape: str, ours: bool) -> float:
        return min(
            (us for (g, s, p), us in took.items() if (g, s) == (group, shape) and p.startswith("spu") == ours),
            default=math.nan,
        )

    def ratio(group: str, shape: str) -> float:
        return best(group, shape, False) / best(group, shape, True)

    def of_bare(group: str, shape: str) -> float:
        return took.get((group, shape, BARE), math.nan) / best(group, shape, True)

    lines = []
    for size in (4096, 8192):
        shape = f"{size}x{size}x{size}"
        lines.append(f"forward at {shape}: {ratio('forward bias+gelu', shape):.2f}x the best of torch (aim 1.0)")
        for group in ("forward bias+gelu", "dx", "dw into main_grad"):
            lines.append(f"{group} at {shape}: {of_bare(group, shape):.2f} of cuBLAS's bare product (aim 0.97)")
    lines.append(f"{STEP} at {_SQUARE}: {ratio(STEP, _SQUARE):.2f}x the best of torch (aim 1.0)")
    layers = [s for s in on_card().shapes() if s[1] != s[2] and 256 <= s[0] <= 4096]
    for peer, aim in (("torch autocast", 1.15), (MEGATRON, 1.05)):
        names = ["x".join(map(str, s)) for s in layers]
        steps = [took[STEP, n, peer] / best(STEP, n, True) for n in names if (STEP, n, peer) in took]
        steps = [value for value in steps if not math.isnan(value)]
        if steps:
            mean = math.exp(sum(map(math.log, steps)) / len(steps))
            lines.append(f"steps of {len(steps)} decoder layers, 256 to 4,096 tokens: {mean:.2f}x {peer} (aim {aim})")
    for group, shape in {(g, s) for g, s, _ in took if g == "attention step"}:
        cudnn = took.get((group, shape, "SDPA cuDNN"), math.nan)
        lines.append(f"{group} at {shape}: {cudnn / best(group, shape, True):.2f}x cuDNN's (aim 1.0)")
    for group, aim in (("pack", 0.8), ("unpack", 0.8), ("adamw", 0.85)):
        found = [value for (g, peer), value in share.items() if g.split()[0] == group and peer.startswith("spu")]
        if found:
            lines.append(f"{group}: {min(found):.2f} to {max(found):.2f} of the copy's bandwidth (aim {aim})")
    return [line for line in lines if "nan" not in line]


def _markdown(result: dict[str, Any]) -> str:
    facts, ceilings = result["facts"], result["peaks"]
    lines = [f"# {facts['device']}, {facts['date'][:7]}", ""]
    lines.append(", ".join(f"{key} {value}" for key, value in facts.items()))
    copied, product = ceilings["copy_bytes_per_s"] / 1e9, ceilings["product_flops"] / 1e12
    lines += ["", f"Copy {copied:,.0f} GB/s (read and written); cuBLAS fp16 8192-cube {product:,.0f} TFLOP/s.", ""]
    lines += [*(f"- {line}" for line in targets(result["rows"])), ""]
    lines += [
        "| what | shape | by | us | eager us | rate | share of peak | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        head = f"| {row['group']} | {row['shape']} | {row['peer']} "
        if "error" in row:
            lines.append(head + f"| not measured: {row['error'][:80]} | | | | |")
            continue
        rate = f"{row['tflops']:,.0f} TFLOP/s" if "tflops" in row else f"{row['gb_per_s']:,.0f} GB/s"
        eager = f"{row['eager_us']:,.1f}" if row.get("captured") else "the same"
        lines.append(head + f"| {row['us']:,.1f} | {eager} | {rate} | {row['share']:.2f} | {row['peak_mib']:,} |")
    return "\n".join(lines) + "\n"


def _facts() -> dict[str, str]:
    import triton

    from spu import __version__

    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": str(torch.version.cuda),
        "triton": triton.__version__, "spu": __version__, "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def _earlier(path: Path, facts: dict[str, str]) -> dict[str, Any] | None:
    """An earlier run's result, if it was of the same card, versions and month."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    same = {key: value for key, value in facts.items() if key != "date"}
    return found if {key: found["facts"].get(key) for key in same} == same else None


def rehearse() -> int:
    """Calls every case once, small, on the CPU; returns how many of ours failed. Interpreted where triton is there."""
    from spu.ops import backends

    failed, absent = 0, {f"spu {name}" for name, status in backends().items() if not status.available}
    for case in (*cases(rehearsal()), *layer_cases(rehearsal())):
        line = f"{case.group}: {case.shape} by {case.peer}"
        try:
            case.make()()
        except Exception as error:
            excused = case.peer in absent or not case.peer.startswith("spu")
            failed += not excused
            line += f": {'not here' if excused else 'FAILED'}: {type(error).__name__}: {str(error)[:100]}"
        print(line, flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure this card.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--again", action="store_true", help="measure everything, also what an earlier run has")
    parser.add_argument("--dry", action="store_true", help="call everything once, small, on the CPU; measure nothing")
    options = parser.parse_args()
    if options.dry:
        sys.exit(rehearse())
    began, facts = time.monotonic(), _facts()
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    options.out.mkdir(parents=True, exist_ok=True)
    base = options.out / f"{slug}-{facts['date'][:7]}"
    result = None if options.again else _earlier(base.with_suffix(".json"), facts)
    if result is None:
        result = {"facts": facts, "command": "make gpu-bench", "peaks": peaks(), "rows": []}
    done = {(row["group"], row["shape"], row["peer"]) for row in result["rows"] if "error" not in row}
    result["rows"] = [row for row in result["rows"] if "error" not in row]
    for case in (*cases(on_card()), *layer_cases(on_card())):
        if (case.group, case.shape, case.peer) in done:
            continue
        if time.monotonic() - began > 60 * options.minutes:
            print("time is up: run again for the rest")
            break
        result["rows"].append(_measure(case, result["peaks"]))
        print(json.dumps(result["rows"][-1]), flush=True)
        base.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        base.with_suffix(".md").write_text(_markdown(result))
    print("\n".join(targets(result["rows"])))


if __name__ == "__main__":
    main()
