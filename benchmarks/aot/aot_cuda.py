"""Compile every CUDA kernel for every architecture, without a GPU; write what came out, and fail on a broken limit.

``make aot-cuda``, or: python benchmarks/aot/aot_cuda.py [FOLDER] [--markdown FILE]. SPU_CUDA_ARCHS narrows it. The
folder keeps compiled objects and their compilers' output, so that a second run compiles only what has changed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cuda_gate

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "build_backend"))
os.environ.setdefault("SPU_CUDA_ARCHS", "75;80;86;89;90a;100;120")

import spu_cuda  # noqa: E402

PLAIN_THREADS = 256  # kThreads of csrc/cuda/vector.h


@dataclass
class Row:
    """A kernel, or the instances of one function in an object, on one architecture: the most of what each uses."""

    name: str
    arch: str
    instances: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int
    mix: Counter[str]

    @property
    def occupancy(self) -> float:
        return cuda_gate.occupancy(self.arch, self.registers, self.threads, self.shared_bytes)


def _is_new(made: Path, command: str) -> bool:
    """Whether an object was made by this command from sources that have not changed since."""
    record, depends = made.with_suffix(".command"), made.with_suffix(".d")
    if not (made.exists() and record.exists() and depends.exists() and record.read_text() == command):
        return False
    sources = [name for name in depends.read_text().split() if name.startswith(str(ROOT))]
    return all(Path(name).exists() and Path(name).stat().st_mtime < made.stat().st_mtime for name in sources)


def compile_one(nvcc: Path, one: spu_cuda.Object, folder: Path) -> str:
    """The compiler's output for an object; compiles unless it is up to date."""
    made, log = folder / f"{one.name}.o", folder / f"{one.name}.log"
    arguments = [*spu_cuda.nvcc_command(nvcc, one), "-Xptxas=-v", "-DSPU_REPORT", "-MD", "-MF", str(made)[:-1] + "d"]
    command = shlex.join(arguments)
    if log.exists() and _is_new(made, command):
        return log.read_text()
    done = subprocess.run([*arguments, "-o", str(made)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{one.name} did not compile:\n{done.stdout}")
    log.write_text(done.stdout)
    made.with_suffix(".command").write_text(command)
    print(f"{one.name}: {len(cuda_gate.parse(done.stdout))} kernels", file=sys.stderr, flush=True)
    return done.stdout


def rows_of(one: spu_cuda.Object, output: str, made: Path, tool: str | None) -> list[Row]:
    """The rows of one object; instances of one function share a row."""
    mixes = cuda_gate.instruction_mix(tool, made) if tool else {}
    blocks = cuda_gate.blocks_of(made)
    rows: dict[tuple[str, str], Row] = {}
    for kernel in cuda_gate.parse(output):
        name = "_".join((one.name, *kernel.product)) if blocks else kernel.family
        threads, shared = blocks.get(kernel.product, (PLAIN_THREADS, kernel.shared_bytes))
        row = rows.setdefault((name, kernel.arch), Row(name, kernel.arch, 0, 0, 0, shared, threads, Counter()))
        row.instances += 1
        row.registers = max(row.registers, kernel.registers)
        row.spilled_bytes = max(row.spilled_bytes, kernel.spill_bytes)
        row.shared_bytes = max(row.shared_bytes, shared)
        for kind, count in mixes.get((kernel.name, kernel.arch), Counter()).items():
            row.mix[kind] = max(row.mix[kind], count)
    return list(rows.values())


def faults(one: spu_cuda.Object, output: str, rows: list[Row], disassembled: bool) -> list[str]:
    """Which limits an object breaks, in words."""
    kernels = cuda_gate.parse(output)
    found = cuda_gate.broken_limits(kernels)
    wanted = {flag.rpartition("=")[2] for flag in one.flags if "code=sm_" in flag}
    compiled = {kernel.arch for kernel in kernels}
    if compiled != wanted:
        found.append(f"{one.name}: ptxas told of kernels for {sorted(compiled)}, not {sorted(wanted)}")
    found += [f"{row.name} on {row.arch}: its block does not fit a multiprocessor" for row in rows if not row.occupancy]
    if disassembled and one.name.startswith("gemm_sm"):
        found += [f"{row.name} on {row.arch}: no tensor-core instruction" for row in rows if not row.mix["tensor core"]]
    return found


def markdown(rows: list[Row], version: str) -> str:
    """Return the page of ``make aot-cuda``."""
    kinds = list(cuda_gate.INSTRUCTIONS)
    lines = [
        "# CUDA C++ kernels, compiled ahead of time",
        "",
        f"Every kernel of `csrc/cuda`, compiled without a device. Written by `make aot-cuda`; nvcc {version}.",
        "",
        "Registers and spilled bytes are a thread's, shared memory (bytes, dynamic included) a block's; where a row "
        "stands for several instances of a function (types, codecs, activations), the most of any. Occupancy is an "
        "estimate from registers, shared memory and threads; matrix products live from few, large blocks. The last "
        "columns count instructions in the machine code.",
        "",
        *(f"Exception: {name} on {arch} may spill to {size} bytes of stack: {reason}."
          for (name, arch), (size, reason) in cuda_gate.EXCEPTIONS.items()),
    ]  # fmt: skip
    for arch in sorted({row.arch for row in rows}, key=lambda name: int(name[3:].rstrip("a"))):
        lines += ["", f"## {arch}", ""]
        lines.append("| kernel | instances | registers | spilled | shared | threads | occupancy | "
                     + " | ".join(kinds) + " |")  # fmt: skip
        lines.append("|---" * (7 + len(kinds)) + "|")
        for row in rows:
            if row.arch == arch:
                counts = " | ".join(str(row.mix[kind]) for kind in kinds)
                lines.append(
                    f"| {row.name} | {row.instances} | {row.registers} | {row.spilled_bytes} | {row.shared_bytes} | "
                    f"{row.threads} | {row.occupancy:.2f} | {counts} |"
                )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile all CUDA C++ kernels and check them.")
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build/aot-cuda")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    options = parser.parse_args()
    if lacks := spu_cuda.missing():
        raise SystemExit("compiling the CUDA kernels needs " + "; ".join(lacks))
    options.folder.mkdir(parents=True, exist_ok=True)
    nvcc, archs = spu_cuda.find_nvcc(), spu_cuda.architectures()
    assert nvcc is not None
    objects = spu_cuda.device_objects(archs)
    with ThreadPoolExecutor(spu_cuda.heavy_jobs()) as pool:
        outputs = list(pool.map(lambda one: compile_one(nvcc, one, options.folder), objects))
    tool, rows, failures = cuda_gate.disassembler(), [], []
    for one, output in zip(objects, outputs):
        made = rows_of(one, output, options.folder / f"{one.name}.o", tool)
        failures += faults(one, output, made, tool is not None)
        rows += made
    text = markdown(rows, ".".join(map(str, spu_cuda.nvcc_version(nvcc) or ())))
    if options.markdown is not None:
        options.markdown.write_text(text)
    print(text)
    print(*failures, sep="\n", file=sys.stderr)
    print(f"{sum(row.instances for row in rows)} kernels, {len(failures)} broken limits", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
