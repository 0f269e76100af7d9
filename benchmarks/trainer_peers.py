"""Tokens a second of `spu train` on one stage beside ``transformers.Trainer``: the same model, batches and updates.

    python benchmarks/trainer_peers.py [--steps 4] [--turns 3] [--precision fp32,bf16] [--threads 2]

A Llama of 30M parameters, a step of 8 sequences of 256 tokens, AdamW, gradients clipped to 1, no evaluation, no
checkpoint. The Trainer's 16 bits are its own: fp32 weights under autocast. The two take turns, so that a machine that
slows down slows both; the medians of all steps but the first of each turn are printed, as a line of JSON: by the
clock, and by the processor's time, which other programs disturb less (compare it with one thread alone).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from spu import DeviceManager, ModelParallelTrainer
from spu.optim import AdamW

ROWS, TOKENS = 8, 256
SIZES: dict[str, Any] = {
    "vocab_size": 9216,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": TOKENS,
    "pad_token_id": None,
}


Seconds = tuple[float, float]


def rate(seconds: list[Seconds], which: int) -> float:
    """Return tokens a second, by the median step."""
    return ROWS * TOKENS / statistics.median(step[which] for step in seconds)


def model() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).train()


def rows(steps: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(SIZES["vocab_size"], (steps * ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def now() -> Seconds:
    """Return the clock's seconds, and those that this process has worked."""
    return time.perf_counter(), time.process_time()


def since(begin: Seconds) -> Seconds:
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def theirs(steps: int, precision: str) -> Iterator[Seconds]:
    """Yield the seconds of each step of ``transformers.Trainer``; it runs between two of its callbacks."""

    class Paused(transformers.TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.begin: Seconds = (0.0, 0.0)
            self.seconds: list[Seconds] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(since(self.begin))

    clock = Paused()
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=ROWS,
            max_steps=steps,
            learning_rate=1e-3,
            weight_decay=0.1,
            max_grad_norm=1.0,
            bf16=precision == "bf16",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(model(), args, train_dataset=rows(steps), callbacks=[clock])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    yield from clock.seconds


def ours(steps: int, precision: str, microbatches: int, threads: int) -> Iterator[Seconds]:
    """Yield the seconds of each step of the trainer that `spu train` runs, on one stage."""
    own = rows(steps)

    def made(parameters: Any) -> AdamW:
        return AdamW(parameters, lr=1e-3, weight_decay=0.1)

    keys: dict[str, Any] = {"precision": precision, "microbatches": microbatches, "max_grad_norm": 1.0}
    devices = [dataclasses.replace(device, threads=threads) for device in DeviceManager().get_devices("cpu")]
    with ModelParallelTrainer(model(), devices, optimizer=made, shift=True, **keys) as trainer:
        for step in range(steps):
            ids = torch.stack([row["input_ids"] for row in own[step * ROWS : (step + 1) * ROWS]])
            begin = now()
            trainer.step({"input_ids": ids, "labels": ids})
            yield since(begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    parameters = sum(p.numel() for p in model().parameters())
    for precision in options.precision.split(","):
        found: dict[str, list[Seconds]] = {"transformers.Trainer": [], "spu": []}
        for _ in range(options.turns):
            found["transformers.Trainer"] += list(theirs(options.steps, precision))[1:]
            found["spu"] += list(ours(options.steps, precision, options.microbatches, options.threads))[1:]
        speed = {name: [rate(seconds, k) for k in range(2)] for name, seconds in found.items()}
        result = {
            "precision": precision,
            "parameters": parameters,
            "tokens_per_s": {name: round(clock, 1) for name, (clock, _) in speed.items()},
            "tokens_per_processor_s": {name: round(worked, 1) for name, (_, worked) in speed.items()},
            "ratio": round(speed["spu"][0] / speed["transformers.Trainer"][0], 2),
            "ratio_by_processor_time": round(speed["spu"][1] / speed["transformers.Trainer"][1], 2),
            "seconds": {name: [[round(s, 2) for s in step] for step in steps] for name, steps in found.items()},
            "threads": options.threads,
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "processor": platform.processor() or platform.machine(),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
