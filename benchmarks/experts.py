"""Steps of a mixture of experts: experts one by one, by transformers' ``grouped_mm``, and by the fused op, in turns.

    python benchmarks/experts.py --precision bf16 --turns 10
    python benchmarks/experts.py --precision fp16 --loop          # spu.accelerate in a loop, fp32 parameters

One thread. A line for each way: the median step, the best, and the median of the pairs beside the fused op's.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import transformers

import spu

WAYS = ("eager", "grouped_mm", "fused")


def model_of(way: str, arguments: argparse.Namespace) -> Any:
    """Return a Qwen3-MoE whose experts are computed in one way."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=arguments.width // 8,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top,
        moe_intermediate_size=arguments.hidden,
        norm_topk_prob=True,
        experts_implementation="eager" if way == "eager" else "grouped_mm",
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).train()


@contextmanager
def only(way: str) -> Iterator[None]:
    """Leave experts to torch while a model is accelerated, unless they are to be fused."""
    module: Any = sys.modules["spu.nn.accelerate"]
    kept = module.experts_block
    if way != "fused":
        module.experts_block = lambda _: None
    try:
        yield
    finally:
        module.experts_block = kept


def trained(way: str, arguments: argparse.Namespace, ids: torch.Tensor) -> Callable[[], float]:
    """Return a trainer's step, planned and warmed up."""
    model = model_of(way, arguments)
    trainer = spu.ModelParallelTrainer(
        model, "cpu:0", precision=arguments.precision, microbatches=arguments.microbatches
    )
    with only(way):
        trainer.step(ids[:, :-1], ids[:, 1:])
    return lambda: trainer.step(ids[:, :-1], ids[:, 1:]).loss


def looped(way: str, arguments: argparse.Namespace, ids: torch.Tensor) -> Callable[[], float]:
    """Return a forward and backward of ``spu.accelerate``'s modules, with fp32 parameters."""
    model = model_of(way, arguments)
    with only(way):
        spu.accelerate(model, arguments.precision)

    def step() -> float:
        model.zero_grad()
        total = 0.0
        for part in ids.chunk(arguments.microbatches):
            loss = F.cross_entropy(model(part[:, :-1]).logits.flatten(0, 1).float(), part[:, 1:].flatten())
            loss.backward()
            total += loss.item()
        return total / arguments.microbatches

    return step


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--loop", action="store_true")
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    for name, default in (("turns", 8), ("width", 512), ("layers", 4), ("experts", 16), ("top", 4), ("hidden", 352)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("rows", 4), ("tokens", 256), ("microbatches", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ids = torch.randint(0, 1024, (arguments.rows, arguments.tokens + 1), generator=torch.Generator().manual_seed(1))
    make = looped if arguments.loop else trained
    steps = {way: make(way, arguments, copy.copy(ids)) for way in arguments.ways}
    times: dict[str, list[float]] = {way: [] for way in steps}
    losses: dict[str, float] = {}
    for turn in range(arguments.turns + 1):
        for way, step in steps.items():
            begin = time.process_time()
            losses[way] = step()
            if turn:
                times[way].append(time.process_time() - begin)
    last = times[arguments.ways[-1]]
    for way, found in times.items():
        pairs = statistics.median(a / b for a, b in zip(found, last, strict=True))
        middle = statistics.median(found)
        print(
            f"{arguments.precision} {way:10} median {1e3 * middle:7.0f} ms  best {1e3 * min(found):7.0f}  "
            f"{pairs:.2f}x  loss {losses[way]:.5f}"
        )


if __name__ == "__main__":
    main()
