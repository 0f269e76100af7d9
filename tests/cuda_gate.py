"""What ptxas and the disassembler say about compiled CUDA kernels, and the limits that they must keep."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MOST_REGISTERS = 255
TENSOR_CORE = {"75": "HMMA", "80": "HMMA", "90": "HGMMA"}  # by the generation in an object's name


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture, from ``ptxas -v``."""

    name: str
    arch: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


def parse(text: str) -> list[Kernel]:
    """Every kernel that a compiler's output tells of."""
    pattern = (
        r"Compiling entry function '(\S+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    found = []
    for name, arch, stack, stores, loads, registers, rest in re.findall(pattern, text, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        found.append(
            Kernel(name, arch, int(registers), int(stores) + int(loads), int(stack), int(shared[1]) if shared else 0)
        )
    return found


def broken_limits(kernels: list[Kernel]) -> list[str]:
    """The kernels that spill, use a stack, or use more registers than there are, in words."""
    return [
        f"{kernel.name} on {kernel.arch}: {kernel.registers} registers, {kernel.spill_bytes} bytes spilled, "
        f"{kernel.stack_bytes} bytes of stack"
        for kernel in kernels
        if kernel.spill_bytes or kernel.stack_bytes or kernel.registers > MOST_REGISTERS
    ]


def disassembler() -> str | None:
    """cuobjdump: of the toolkit, or the one inside triton."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.submodule_search_locations:
        inside = Path(next(iter(spec.submodule_search_locations))) / "backends/nvidia/bin/cuobjdump"
        found = str(inside) if inside.exists() else None
    return found


def count_instruction(tool: str, made: Path, name: str) -> int:
    """How often an instruction occurs in an object's machine code."""
    folder = Path(tool).parent  # cuobjdump looks for nvdisasm on the PATH
    done = subprocess.run(
        [tool, "--dump-sass", str(made)], capture_output=True, text=True, check=True, env={"PATH": f"{folder}:/usr/bin"}
    )
    return len(re.findall(rf"\b{name}\b", done.stdout))
