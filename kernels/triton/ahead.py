"""Compiles launches ahead of time, for architectures that are not here, and reads what came out.

``recording()`` keeps launches instead of running them: the real launchers are called with CPU tensors, so what is
compiled is what they would launch, with the specialisations (alignment, unit strides) that Triton would give it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from spu.kernels.limits import Limits, read

_ELEMENT = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.int8: "i8",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
_ALIGN = 16
_REGISTERS, _THREADS, _BLOCKS = 65536, {75: 1024, 86: 1536, 89: 1536, 120: 1536}, 32
_SHARED_OF_A_MULTIPROCESSOR = {
    75: 64 << 10, 80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10,
}  # fmt: skip
_TENSOR_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


@dataclass(frozen=True)
class Launch:
    """One specialised launch. ``arguments`` are (name, Triton type, divisible by 16); the rest are compile-time."""

    kernel: Any
    arguments: tuple[tuple[str, str, bool], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Built:
    """The compiler's result for a launch. ``spilled_bytes`` is a thread's stack, ``tensor_core`` the instruction;
    ``mix``, ``peak_share`` and ``load_bytes`` are ``limits.Limits``'."""

    name: str
    arch: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int
    tensor_core: str
    uses_tma: bool
    contracted: bool
    mix: dict[str, float]
    peak_share: float
    load_bytes: int

    @property
    def resident(self) -> int:
        """The threads that fit a multiprocessor, by registers and shared memory: an estimate."""
        shared = _SHARED_OF_A_MULTIPROCESSOR[self.arch] // (self.shared_bytes + 1024)  # 1 KB is the system's
        registers = _REGISTERS // (-(-max(self.registers, 1) // 8) * 8 * self.threads)  # given out by eights
        return min(shared, registers, self._most // self.threads, _BLOCKS) * self.threads

    @property
    def _most(self) -> int:
        return _THREADS.get(self.arch, 2048)

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's threads that fit."""
        return self.resident / self._most

    @property
    def bytes_in_flight(self) -> int:
        """What the resident threads of a multiprocessor load without waiting: an estimate."""
        return self.resident * self.load_bytes


def _specialised(name: str, value: Any) -> tuple[tuple[str, str, bool] | None, Any]:
    """Return (argument, None), or (None, value) for an argument that becomes a constant."""
    if isinstance(value, torch.Tensor):
        return (name, f"*{_ELEMENT[value.dtype]}", value.data_ptr() % _ALIGN == 0), None
    if isinstance(value, float):
        return (name, "fp32", False), None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"argument {name} is {value!r}: Triton takes tensors, ints and floats")
    if value == 1:
        return None, 1
    return (name, "i32" if -(2**31) <= value < 2**31 else "i64", value % _ALIGN == 0), None


def specialise(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """Return the launch that Triton would compile for a call's arguments."""
    named = dict(zip(kernel.arg_names, args)) | {key: kwargs[key] for key in kwargs if key in kernel.arg_names}
    declared = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    arguments, constants = [], []
    for name in kernel.arg_names:
        if name in declared:
            constants.append((name, named[name]))
            continue
        argument, constant = _specialised(name, named[name])
        if argument is None:
            constants.append((name, constant))
        else:
            arguments.append(argument)
    options = tuple(sorted((key, value) for key, value in kwargs.items() if key not in kernel.arg_names))
    return Launch(kernel, tuple(arguments), tuple(constants), options)


@contextmanager
def recording() -> Iterator[dict[Launch, None]]:
    """Keep launches (each once, in order) inside, and do not run them; not for several threads."""
    kept: dict[Launch, None] = {}

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kept[specialise(self, args, kwargs)] = None

    original = JITFunction.run
    JITFunction.run = record
    try:
        yield kept
    finally:
        JITFunction.run = original


def build(launch: Launch, arch: int, listing: bool = True) -> Built:
    """Compile for an architecture (80 is sm_80); no device is needed. Without ``listing``, ``limits`` are left empty.

    Raises:
        whatever Triton raises when a kernel does not compile, or does not fit.
    """
    constants = dict(launch.constants)
    types = {name: kind for name, kind, _ in launch.arguments} | dict.fromkeys(constants, "constexpr")
    names = launch.kernel.arg_names
    signature = {name: types[name] for name in names}
    divisible = {
        (names.index(name),): [["tt.divisibility", _ALIGN]] for name, _, aligned in launch.arguments if aligned
    }
    source = ASTSource(launch.kernel, signature, {(names.index(k),): v for k, v in constants.items()}, divisible)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    ptx = made.asm["ptx"]
    registers, stack, found = _resources(made.asm["cubin"], arch, listing)
    return Built(
        name=launch.name,
        arch=arch,
        registers=registers,
        spilled_bytes=stack,
        shared_bytes=made.metadata.shared,
        threads=32 * made.metadata.num_warps,
        tensor_core=next((name for name in _TENSOR_INSTRUCTIONS if name in ptx), ""),
        uses_tma="cp.async.bulk.tensor" in ptx,
        contracted="fma.rn.f32" in ptx,
        mix=found.mix,
        peak_share=found.peak_share,
        load_bytes=found.load_bytes,
    )


def _resources(cubin: bytes, arch: int, listing: bool) -> tuple[int, int, Limits]:
    """Return (registers, bytes of stack) of a thread and the code's limits, by the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", *(["--dump-sass"] if listing else []), file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", said)
    registers, stack = (max(int(row[column]) for row in found) for column in (0, 1))
    return registers, stack, read(said, arch) if listing else Limits({}, 0.0, 0)
