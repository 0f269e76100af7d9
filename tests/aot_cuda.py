"""Compiles every CUDA kernel for every architecture, without a GPU, prints what came out, and fails on a broken limit.

``make aot-cuda``, or: python tests/aot_cuda.py [FOLDER]. SPU_CUDA_ARCHS narrows it. Compiled objects are kept in the
folder, and their compilers' output beside them, so that a second run compiles only what has changed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_gate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_backend"))
os.environ.setdefault("SPU_CUDA_ARCHS", "75;80;86;89;90a;100;120")

import spu_cuda  # noqa: E402


def compile_one(nvcc: Path, one: spu_cuda.Object, folder: Path) -> str:
    """The compiler's output for an object; compiles unless the object is newer than all sources."""
    made, log = folder / f"{one.name}.o", folder / f"{one.name}.log"
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*"))
    if made.exists() and log.exists() and made.stat().st_mtime > newest:
        return log.read_text()
    command = [*spu_cuda.nvcc_command(nvcc, one), "-Xptxas=-v", "-o", str(made)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{one.name} did not compile:\n{done.stdout}")
    log.write_text(done.stdout)
    return done.stdout


def main(folder: Path) -> int:
    if lacks := spu_cuda.missing():
        raise SystemExit("compiling the CUDA kernels needs " + "; ".join(lacks))
    folder.mkdir(parents=True, exist_ok=True)
    nvcc, archs = spu_cuda.find_nvcc(), spu_cuda.architectures()
    assert nvcc is not None
    objects = spu_cuda.device_objects(archs)
    with ThreadPoolExecutor(spu_cuda.heavy_jobs()) as pool:
        outputs = list(pool.map(lambda one: compile_one(nvcc, one, folder), objects))
    tool, failures = cuda_gate.disassembler(), []
    print("object arch kernels registers(most) spilled_bytes shared_bytes(static,most) tensor_core_instructions")
    for one, output in zip(objects, outputs):
        kernels = cuda_gate.parse(output)
        failures += cuda_gate.broken_limits(kernels) if kernels else [f"{one.name}: ptxas told of no kernel"]
        name = next(
            (wanted for arch, wanted in cuda_gate.TENSOR_CORE.items() if one.name.startswith(f"gemm_sm{arch}")), ""
        )
        count = cuda_gate.count_instruction(tool, folder / f"{one.name}.o", name) if tool and name else None
        if count == 0:
            failures.append(f"{one.name}: no {name} instruction")
        for arch in sorted({kernel.arch for kernel in kernels}):
            here = [kernel for kernel in kernels if kernel.arch == arch]
            print(one.name, arch, len(here), max(k.registers for k in here), sum(k.spill_bytes for k in here),
                  max(k.shared_bytes for k in here), "-" if count is None else f"{count} {name}")  # fmt: skip
    print(*failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build/aot-cuda")))
