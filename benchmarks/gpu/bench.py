"""Kernels and training steps of one card beside their peers; results as JSON and a markdown table.

    python benchmarks/gpu/bench.py [--out benchmarks/results] [--minutes 8] [--dry]

Rules: medians of events around rounds of calls after a warm-up (spu.tune.measure_us); inputs are random and several
times the cache where bandwidth is asked for; peers run in the same process on the same values; each row is written as
it is measured, so that a run that is cut off keeps what it has. Shares are of the peaks measured first: a large
device-to-device copy (bytes read and written) and an 8192-cube fp16 product by cuBLAS.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# rows (tokens), out, in: squares and the projections of 7B decoders
SHAPES = [(8192, 8192, 8192), (4096, 4096, 4096), (4096, 11008, 4096), (4096, 4096, 11008), (1024, 11008, 4096),
          (1024, 4096, 4096), (256, 11008, 4096), (256, 4096, 4096)]  # fmt: skip
_PACK_NUMEL, _ADAMW_NUMEL, _COPY_BYTES = 256 << 20, 256 << 20, 4 << 30
_VOCABULARY, _HIDDEN, _TOKENS = 92544, 4096, 4096
Row = dict[str, Any]
Case = tuple[str, str, str, float, float, Callable[[], Callable[[], object]]]  # group, shape, peer, flops, bytes, make


def _name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _random(*shape: int) -> Tensor:
    return (torch.randn(shape, device="cuda") / shape[-1] ** 0.5).half()


def _forward(shape: tuple[int, int, int], peer: str) -> Callable[[], object]:
    """y = gelu(x @ w.T + b) in fp16, as inference runs it."""
    from spu import kernels

    rows, out, inner = shape
    x, w, b = _random(rows, inner), _random(out, inner), _random(out)

    def eager() -> Tensor:
        return F.gelu(F.linear(x, w, b), approximate="tanh")

    if peer == "spu":
        return lambda: kernels.linear_fwd(x, w, b, "gelu_tanh")
    if peer == "torch addmm + gelu":
        return lambda: torch._addmm_activation(b, x, w.t(), use_gelu=True)
    return torch.compile(eager) if peer == "torch.compile" else eager


def _step(shape: tuple[int, int, int], peer: str) -> Callable[[], object]:
    """Forward and backward of linear + gelu, gradients unscaled in fp32, added to those of earlier microbatches."""
    rows, out, inner = shape
    x, dy = _random(rows, inner).requires_grad_(), _random(rows, out)
    if peer == "spu":
        return _spu_step(x, dy, nn.Linear(inner, out).cuda().half())
    layer = nn.Linear(inner, out).cuda()  # autocast keeps fp32 weights and gradients
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)

    def forward() -> Tensor:
        with torch.autocast("cuda", torch.float16):
            return F.gelu(layer(x), approximate="tanh")

    run = torch.compile(forward) if peer == "torch.compile" else forward

    def step() -> None:
        scaler.scale((run() * dy).sum()).backward()
        scaler.unscale_(optimizer)
        scaler._per_optimizer_states.clear()  # the next call may unscale again, as after an optimizer's step

    return step


def _spu_step(x: Tensor, dy: Tensor, layer: nn.Linear) -> Callable[[], object]:
    from spu import ops
    from spu.precision import LossScaler, MainGrads

    scaler, mains = LossScaler(init_scale=1024.0), MainGrads(layer.parameters())
    scaler.begin_step()
    mains.begin_step()

    def step() -> None:
        y = ops.linear_act(x, layer.weight, layer.bias, "gelu_tanh")
        scaler.scale((y * dy).sum().float()).backward()

    return step


def _pack(codec: str, unpack: bool) -> Callable[[], object]:
    from spu import ops

    x = torch.randn(_PACK_NUMEL, device="cuda", dtype=torch.float16)
    wire = ops.pack(x, codec)
    return (lambda: ops.unpack(wire, x.shape, x.dtype, codec)) if unpack else (lambda: ops.pack(x, codec))


def _adamw(peer: str) -> Callable[[], object]:
    from spu import kernels

    sizes = [_ADAMW_NUMEL // 16] * 16
    wide = [[torch.rand(n, device="cuda") for n in sizes] for _ in range(4)]
    steps, one, zero = (
        [torch.ones(1, device="cuda") for _ in sizes],
        torch.ones(1, device="cuda"),
        torch.zeros(1).cuda(),
    )
    params = [value.half() for value in wide[0]]
    if peer == "spu":
        return lambda: kernels.adamw_(
            params, wide[1], wide[0], wide[2], wide[3], steps, one, zero, 1e-3, 0.9, 0.999, 1e-8, 0.1
        )
    parameters = [nn.Parameter(value) for value in wide[0]]
    for parameter, grad in zip(parameters, wide[1]):
        parameter.grad = grad
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def step() -> None:  # what fp16 weights with fp32 masters take in plain torch
        optimizer.step()
        torch._foreach_copy_(params, [parameter.detach() for parameter in parameters])

    return step


def _cross_entropy(peer: str) -> Callable[[], object]:
    from spu import ops

    hidden, weight = _random(_TOKENS, _HIDDEN).requires_grad_(), nn.Parameter(_random(_VOCABULARY, _HIDDEN))
    target = torch.randint(0, _VOCABULARY, (_TOKENS,), device="cuda")
    loss: Callable[[], Tensor]
    if peer == "spu":
        loss = lambda: ops.linear_cross_entropy(hidden, weight, target)  # noqa: E731
    elif peer == "Liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()
        loss = lambda: fused(weight, hidden, target)  # noqa: E731
    else:
        loss = lambda: F.cross_entropy(F.linear(hidden, weight).float(), target)  # noqa: E731

    def step() -> None:
        hidden.grad = weight.grad = None
        (1024 * loss()).backward()

    return step


def cases() -> Iterator[Case]:
    """Everything that is measured: (group, shape, peer, FLOPs, bytes, what makes the call)."""
    for shape in SHAPES:
        flops = 2.0 * shape[0] * shape[1] * shape[2]
        for peer in ("spu", "torch eager", "torch addmm + gelu", "torch.compile"):
            yield "forward bias+gelu", _name(shape), peer, flops, 0.0, lambda s=shape, p=peer: _forward(s, p)
        for peer in ("spu", "torch autocast", "torch.compile"):
            yield "step with unscale", _name(shape), peer, 3 * flops, 0.0, lambda s=shape, p=peer: _step(s, p)
    for codec, bits in (("fp16", 16), ("int8", 8.5), ("int4", 5), ("fp8_e4m3", 8.5)):
        moved = _PACK_NUMEL * (2 + bits / 8)
        for unpack in (False, True):
            name = f"{'un' if unpack else ''}pack {codec}"
            yield name, f"{_PACK_NUMEL >> 20}M fp16", "spu", 0.0, moved, lambda c=codec, u=unpack: _pack(c, u)
    for peer, each in (("spu", 30), ("torch fused AdamW + copy", 34)):
        yield "adamw", f"{_ADAMW_NUMEL >> 20}M", peer, 0.0, each * _ADAMW_NUMEL, lambda p=peer: _adamw(p)
    peers = ["spu", "torch eager", *(["Liger"] if importlib.util.find_spec("liger_kernel") else [])]
    for peer in peers:
        flops = 6.0 * _TOKENS * _HIDDEN * _VOCABULARY
        shape = _name((_TOKENS, _VOCABULARY, _HIDDEN))
        yield "linear cross-entropy step", shape, peer, flops, 0.0, lambda p=peer: _cross_entropy(p)


def peaks() -> dict[str, float]:
    """The card's ceilings: bytes/s of a copy, FLOP/s of cuBLAS."""
    from spu.tune import measure_us

    device = torch.device("cuda")
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy_us = measure_us(lambda: target.copy_(source), device)
    a, b = _random(8192, 8192), _random(8192, 8192)
    product_us = measure_us(lambda: a @ b, device)
    return {"copy_bytes_per_s": 2e6 * _COPY_BYTES / copy_us, "product_flops": 1e6 * 2 * 8192**3 / product_us}


def _measure(case: Case, ceilings: dict[str, float]) -> Row:
    from spu.tune import measure_us

    group, shape, peer, flops, moved, make = case
    row: Row = {"group": group, "shape": shape, "peer": peer}
    try:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        call = make()
        row["us"] = measure_us(call, torch.device("cuda"))
        row["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    if flops:
        row |= {"tflops": flops / row["us"] / 1e6, "share": 1e6 * flops / row["us"] / ceilings["product_flops"]}
    else:
        row |= {"gb_per_s": moved / row["us"] / 1e3, "share": 1e6 * moved / row["us"] / ceilings["copy_bytes_per_s"]}
    return row


def _markdown(result: dict[str, Any]) -> str:
    facts, ceilings = result["facts"], result["peaks"]
    lines = [f"# {facts['device']}, {facts['date'][:7]}", ""]
    lines.append(", ".join(f"{key} {value}" for key, value in facts.items()))
    copied, product = ceilings["copy_bytes_per_s"] / 1e9, ceilings["product_flops"] / 1e12
    lines += ["", f"Copy {copied:,.0f} GB/s (read and written); cuBLAS fp16 8192-cube {product:,.0f} TFLOP/s.", ""]
    lines += ["| what | shape | by | us | rate | share of peak | peak MiB |", "|---|---|---|---|---|---|---|"]
    for row in result["rows"]:
        head = f"| {row['group']} | {row['shape']} | {row['peer']} "
        if "error" in row:
            lines.append(head + f"| failed: {row['error'][:80]} | | | |")
            continue
        rate = f"{row['tflops']:,.0f} TFLOP/s" if "tflops" in row else f"{row['gb_per_s']:,.0f} GB/s"
        lines.append(head + f"| {row['us']:,.1f} | {rate} | {row['share']:.2f} | {row['peak_mib']:,} |")
    return "\n".join(lines) + "\n"


def _facts() -> dict[str, str]:
    import triton

    from spu import __version__

    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": str(torch.version.cuda),
        "triton": triton.__version__, "spu": __version__, "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure this card.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--dry", action="store_true", help="list what would be measured")
    options = parser.parse_args()
    if options.dry:
        for group, shape, peer, *_ in cases():
            print(f"{group}: {shape} by {peer}")
        return
    began, facts = time.monotonic(), _facts()
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    result: dict[str, Any] = {"facts": facts, "command": "make gpu-bench", "peaks": peaks(), "rows": []}
    options.out.mkdir(parents=True, exist_ok=True)
    base = options.out / f"{slug}-{facts['date'][:7]}"
    for case in cases():
        if time.monotonic() - began > 60 * options.minutes:
            print("time is up: the rest was not measured")
            break
        result["rows"].append(_measure(case, result["peaks"]))
        print(json.dumps(result["rows"][-1]), flush=True)
        base.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        base.with_suffix(".md").write_text(_markdown(result))


if __name__ == "__main__":
    main()
