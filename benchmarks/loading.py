"""Load a checkpoint of a few GB in a process whose data the system limits to the model's bytes, its largest tensor and
5%, and save it again in 64 MB more than the model.

    python benchmarks/loading.py --folder build/loading --gigabytes 4
    python benchmarks/loading.py --folder build/loading --gigabytes 4 --spill   # into files instead of memory

The checkpoint is InternLM2's, of width 2,048, in the dtype that is asked for. It prints the peaks and the speeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from spu.model.convert.decoder import empty_decoder
from spu.model.convert.internlm2 import internlm2_config, layout_of
from spu.model.convert.shards import PIECE_BYTES, write_shard

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from hard_limit import run_limited

LOAD = """
import contextlib, gc, resource, sys, time
from pathlib import Path
import spu
from spu.train.model import make_model

small, large, out, headroom, spill = sys.argv[1:4] + [int(sys.argv[4]), sys.argv[5]]

def held():
    gc.collect()
    return int(open("/proc/self/status").read().split("VmData:")[1].split()[0]) * 1024

def limit(headroom):
    resource.setrlimit(resource.RLIMIT_DATA, (held() + headroom, resource.RLIM_INFINITY))

make_model(small, 0)  # all that is imported and cached
before = held()
limit(headroom)
begin = time.perf_counter()
with spu.spilled(spill) if spill else contextlib.nullcontext():
    model = make_model(large, 0)
loaded = time.perf_counter() - begin
limit(64 << 20)
begin = time.perf_counter()
model.spu_checkpoint.save(model, Path(out))
print(before, loaded, time.perf_counter() - begin)
"""


def write(folder: Path, layers: int, width: int, dtype: torch.dtype) -> tuple[int, int]:
    """Write an InternLM2 checkpoint; return its number of parameters, and that of its largest tensor."""
    values = {
        "model_type": "internlm2",
        "bias": False,
        "vocab_size": 92544 if width > 64 else 64,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    layout = layout_of(empty_decoder(internlm2_config(values, str(folder))))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))

    def pieces(name: str) -> Iterator[torch.Tensor]:
        number, most = layout[name].numel, PIECE_BYTES // dtype.itemsize
        for first in range(0, number, most):
            yield torch.randn(min(most, number - first)).mul_(0.02).to(dtype)

    tensors = [(name, layout[name].shape) for name in layout]
    write_shard(folder / "model.safetensors", tensors, dtype, pieces, {"format": "pt"})
    sizes = [stored.numel for stored in layout.values()]
    return sum(sizes), max(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/loading"))
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the checkpoint, about")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--spill", action="store_true", help="put the model into files")
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    shutil.rmtree(given.folder, ignore_errors=True)
    ends, layer = 2 * 92544 * 2048, 63e6
    layers = max(1, round((given.gigabytes * 1e9 / dtype.itemsize - ends) / layer))
    write(given.folder / "small", 1, 64, dtype)
    count, largest = write(given.folder / "large", layers, 2048, dtype)
    headroom = int(((0 if given.spill else 4 * count) + 4 * largest) * 1.05)
    spill = str(given.folder / "spill") if given.spill else ""
    places = [str(given.folder / name) for name in ("small", "large", "saved")]
    run = run_limited(LOAD, arguments=[*places, str(headroom), spill], seconds=3600)
    if run.code:
        raise SystemExit(f"failed within {headroom / 1e9:.2f} GB: {run.errors[-2000:]}")
    held, loaded, saved = map(float, run.output.split())
    gigabytes = count * dtype.itemsize / 1e9
    what = f"{count / 1e6:,.0f}M parameters, {gigabytes:.2f} GB of {given.dtype}, {4 * count / 1e9:.2f} GB of fp32"
    print(f"{what}, largest tensor {4 * largest / 1e9:.2f} GB")
    print(f"limit of the load: {headroom / 1e9:.2f} GB beyond the {held / 1e9:.2f} GB before it; ", end="")
    print(f"most ever held: {(run.peaks['VmData'] - held) / 1e9:.2f} GB beyond them")
    print(f"loaded in {loaded:.1f} s ({gigabytes / loaded:.2f} GB/s), saved in fp32 in {saved:.1f} s")
    shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
