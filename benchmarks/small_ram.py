"""The main job with a model whose training state is four times what the process may hold, beside the job in memory.

Two runs of ``spu train`` with the same seed: one streams from a disk and may have only a quarter of the state as data
(RLIMIT_DATA, which the system enforces: a request beyond it fails), the other has no limit and keeps everything in
memory. Their losses have to be the same to the last bit. It prints both speeds, and the peak beside the limit.

    python benchmarks/small_ram.py --folder build/small-ram --steps 4
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

STATE_BYTES = 18  # a parameter: 16-bit weight, fp32 gradient, fp32 master, two fp32 moments

LIMITED = """
import resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from spu.cli.app import main
raise SystemExit(main(sys.argv[2:]))
"""


def config(width: int, layers: int) -> dict[str, Any]:
    """Return a decoder over bytes."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 256,
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 128),
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }


def parameters(c: dict[str, Any]) -> int:
    """Return the number of parameters of ``config``."""
    width, inner = c["hidden_size"], c["intermediate_size"]
    kept = 64 * c["num_key_value_heads"]
    layer = 2 * width * width + 2 * width * kept + 3 * width * inner + 2 * width
    return int(c["num_hidden_layers"] * layer + 2 * c["vocab_size"] * width + width)


def run(command: list[str], log: Path) -> tuple[int, float]:
    """Run a command; return the most data that it held, in bytes (VmData), and its seconds.

    Raises:
        SystemExit: it failed; its log's last lines are printed.
    """
    peak, begin = 0, time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.02):
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    peak = max(peak, int(status.split("VmData:")[1].split()[0]) * 1024)
                except (OSError, IndexError):
                    continue

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        done.set()
        watcher.join()
    if code:
        print("".join(log.read_text().splitlines(keepends=True)[-20:]))
        raise SystemExit(f"{' '.join(command[-12:])} ended with {code}; its log is {log}")
    return peak, time.perf_counter() - begin


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the training rows of a run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/small-ram"), help="for the runs and the disk tier")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--overhead", default="700MB", help="of the limit, for Python, torch and its libraries")
    parser.add_argument("--state", default="fp32")
    arguments = parser.parse_args()
    from spu.data.text import default_text
    from spu.devices.manager import parse_bytes

    folder, model = arguments.folder.absolute(), config(arguments.width, arguments.layers)
    state = STATE_BYTES * parameters(model)
    limit = state // 4
    budget = limit - parse_bytes(arguments.overhead)
    if budget <= 0:
        raise SystemExit(f"a quarter of the state is {limit} bytes, less than Python and torch take: a larger model")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model))
    text = b"".join(default_text().pieces())  # of which the last tenth or so is for validation
    (folder / "text.txt").write_bytes(text[:20_000])
    common = ["train", "--model", str(folder / "config.json"), "--steps", str(arguments.steps), "--recompute", "on"]
    common += ["--data", str(folder / "text.txt")]
    common += ["--batch", str(arguments.batch), "--seq", str(arguments.seq), "--evals", "1", "--no-sample"]
    common += ["--microbatches", str(arguments.microbatches), "--devices", "cpu", "--state", arguments.state]
    streamed = ["--budget", f"cpu={budget}B,disk={folder / 'disk'}:{3 * state}B", "--residency", "streamed"]
    os.environ["MALLOC_ARENA_MAX"] = "1"  # one heap, whose free room every thread can use
    print(f"{parameters(model) / 1e6:.0f} M parameters, state {state / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB")
    results = {}
    for name, more in (("limited", streamed), ("in memory", ["--residency", "resident", "--schedule", "1f1b"])):
        place = folder / name.replace(" ", "-")
        allowed = limit if name == "limited" else resource.RLIM_INFINITY
        command = [sys.executable, "-c", LIMITED, str(allowed), *common, *more]
        command += ["--out", str(folder), "--name", place.name]
        peak, seconds = run(command, folder / f"{place.name}.log")
        found = rows(place)
        rates = sorted(row["tokens_per_s"] for row in found[1:] or found)
        results[name] = [row["loss"] for row in found], rates[len(rates) // 2]
        print(f"{name}: {rates[len(rates) // 2]:.0f} tokens/s, peak data {peak / 1e9:.2f} GB, {seconds:.0f} s in all")
    (ours, rate), (plain, plain_rate) = results["limited"], results["in memory"]
    print(f"losses: {ours}")
    print(f"speed: {rate / plain_rate:.2f} of the run in memory")
    if ours != plain or not all(map(math.isfinite, ours)):
        raise SystemExit(f"the losses differ: in memory {plain}")
    print("the losses are the same, bit for bit")


if __name__ == "__main__":
    main()
