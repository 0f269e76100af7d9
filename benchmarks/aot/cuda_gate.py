"""What ptxas and the disassembler say about compiled CUDA kernels, and the limits that they must keep."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

MOST_REGISTERS = 255
# Instructions that tell how a kernel works, by a name for their kind.
INSTRUCTIONS = {
    "tensor core": r"(HMMA|HGMMA)\b",
    "asynchronous load": r"(LDGSTS|UTMALDG)\b",
    "16-byte access": r"(LDG|STG)\.\S*128",
    "fp32": r"(FFMA|FADD|FMUL)\b",
    "special function": r"MUFU\b",
}
# Of a multiprocessor (CUDA C++ programming guide, compute capabilities): threads, blocks, bytes of shared memory.
LIMITS = {
    "75": (1024, 16, 64 << 10),
    "80": (2048, 32, 164 << 10),
    "86": (1536, 16, 100 << 10),
    "89": (1536, 24, 100 << 10),
    "90": (2048, 32, 228 << 10),
    "100": (2048, 32, 228 << 10),
    "120": (1536, 24, 100 << 10),
}
REGISTERS, REGISTER_UNIT = 65536, 256  # a warp's registers are handed out in units


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture, from ``ptxas -v``."""

    name: str
    arch: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int

    @property
    def family(self) -> str:
        """The name of the function that it is an instance of."""
        found = re.search(r"\d([a-z_]+_kernel)", self.name)
        return found[1] if found else self.name

    @property
    def product(self) -> tuple[str, str]:
        """(type, tile) of a matrix product, as CUTLASS's types in its name tell."""
        small = "GemmShapeILi64ELi64E" in self.name and "GemmShapeILi128ELi128E" not in self.name
        return "bf16" if "bfloat16_t" in self.name else "fp16", "small" if small else "large"


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


# How many bytes of stack a kernel may spill to on an architecture, and why: {(family, "sm_75"): (8, "because")}.
EXCEPTIONS: dict[tuple[str, str], tuple[int, str]] = {}


def _is_excused(kernel: Kernel) -> bool:
    return 0 < kernel.stack_bytes <= EXCEPTIONS.get((kernel.family, kernel.arch), (0, ""))[0]


def broken_limits(kernels: list[Kernel]) -> list[str]:
    """The kernels that spill, use a stack, or use more registers than there are, in words; but for the exceptions."""
    return [
        f"{kernel.name} on {kernel.arch}: {kernel.registers} registers, {kernel.spill_bytes} bytes spilled, "
        f"{kernel.stack_bytes} bytes of stack"
        for kernel in kernels
        if ((kernel.spill_bytes or kernel.stack_bytes) and not _is_excused(kernel)) or kernel.registers > MOST_REGISTERS
    ]


def occupancy(arch: str, registers: int, threads: int, shared_bytes: int) -> float:
    """The share of a multiprocessor's threads that fit, by registers, shared memory and blocks; ``arch`` as "sm_80"."""
    most, blocks, shared = LIMITS[arch.removeprefix("sm_").rstrip("a")]
    warps = -(-threads // 32)
    unit = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    reserved = 0 if arch == "sm_75" else 1024  # of each block's, by the system
    by_shared = shared // (shared_bytes + reserved) if shared_bytes else blocks
    return min(REGISTERS // (unit * warps), by_shared, blocks, most // threads) * threads / most


def disassembler() -> str | None:
    """cuobjdump: of the toolkit, or the one inside triton."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.submodule_search_locations:
        inside = Path(next(iter(spec.submodule_search_locations))) / "backends/nvidia/bin/cuobjdump"
        found = str(inside) if inside.exists() else None
    return found


def instruction_mix(tool: str, made: Path) -> dict[tuple[str, str], Counter[str]]:
    """How often each kind of ``INSTRUCTIONS`` occurs in an object's machine code, by (kernel, architecture)."""
    folder = Path(tool).parent  # cuobjdump looks for nvdisasm on the PATH
    done = subprocess.run(
        [tool, "--dump-sass", str(made)], capture_output=True, text=True, check=True, env={"PATH": f"{folder}:/usr/bin"}
    )
    kinds = {kind: re.compile(rf"\*/\s+(?:@!?\w+\s+)?{pattern}") for kind, pattern in INSTRUCTIONS.items()}
    found: dict[tuple[str, str], Counter[str]] = {}
    arch, mix = "", Counter[str]()
    for line in done.stdout.splitlines():
        if told := re.match(r"(?:arch =|code for) (sm_\w+)", line.strip()):
            arch = told[1]
        elif told := re.match(r"Function : (\S+)", line.strip()):
            mix = found.setdefault((told[1], arch), Counter())
        else:
            mix.update(kind for kind, pattern in kinds.items() if pattern.search(line))
    return found


def blocks_of(made: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """(threads, bytes of dynamic shared memory) of the blocks of an object's matrix products, by (type, tile)."""
    listed = subprocess.run(["nm", "--print-size", "--radix=d", str(made)], capture_output=True, text=True, check=True)
    found: dict[tuple[str, str], dict[str, int]] = {}
    for size, kind, dtype, tile in re.findall(r"\d+ (\d+) \w spu_block_([a-z]+)_([a-z0-9]+)_([a-z]+)", listed.stdout):
        found.setdefault((dtype, tile), {})[kind] = int(size)
    return {product: (sizes["threads"], sizes["shared"]) for product, sizes in found.items()}
