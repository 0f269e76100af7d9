"""Compiles launches ahead of time, for architectures that are not here, and reads what came out.

``recording()`` keeps launches instead of running them: the real launchers are called with CPU tensors, which stand for
those of a GPU. Triton's own ``JITFunction.run`` binds the arguments there, so what is kept is, to the last attribute,
what it would compile, and ``build`` puts it into Triton's cache under the key that the launch on the GPU looks for.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton.runtime.cache import get_cache_key
from triton.runtime.jit import JITFunction

from spu.kernels.launch import standing_for
from spu.kernels.limits import Limits, access_bytes, read

# Of a multiprocessor (CUDA C++ programming guide, compute capabilities); 2048 threads and 32 blocks elsewhere.
_REGISTERS, _THREADS, _BLOCKS = 65536, {75: 1024, 86: 1536, 89: 1536, 120: 1536}, {75: 16, 86: 16, 89: 24, 120: 24}
_SHARED_OF_A_MULTIPROCESSOR = {
    75: 64 << 10, 80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10,
}  # fmt: skip
_TENSOR_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


@dataclass(frozen=True)
class Launch:
    """One specialised launch, as Triton binds it. Two are equal if they have the same ``key``.

    Attributes:
        kernel: the jitted function.
        key: all that the compiled code depends on beside the kernel's source and the architecture, as text.
        signature: the type of each parameter by name, "constexpr" for those that are compiled in.
        constexprs: the values of those, by their place.
        attrs: what else is known of arguments (divisibility), by their place.
        options: the compiler's, as far as they differ from its defaults, and always warps and stages.
        folder: the name that the launch itself looks for in Triton's cache, a hash in hexadecimal.
    """

    kernel: Any = field(compare=False)
    name: str
    key: str
    signature: dict[str, Any] = field(compare=False)
    constexprs: dict[tuple[int, ...], Any] = field(compare=False)
    attrs: dict[tuple[int, ...], Any] = field(compare=False)
    options: tuple[tuple[str, Any], ...]
    folder: str = field(compare=False)

    @property
    def constants(self) -> tuple[tuple[str, Any], ...]:
        """The compiled-in values by the names of their parameters."""
        names = list(self.signature)
        return tuple((names[place[0]], value) for place, value in self.constexprs.items())


@dataclass(frozen=True)
class Built:
    """The compiler's result for a launch. ``spilled_bytes`` is a thread's stack, ``tensor_core`` the instruction;
    ``mix``, ``peak_share`` and ``load_bytes`` are ``limits.Limits``', ``widest_load`` and ``widest_store`` bytes of one
    access to global memory, of those that are no asynchronous copies."""

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
    widest_load: int
    widest_store: int

    @property
    def blocks(self) -> int:
        """The blocks that fit a multiprocessor, by registers, shared memory and threads."""
        system = 0 if self.arch == 75 else 1024  # bytes of each block's shared memory
        shared = _SHARED_OF_A_MULTIPROCESSOR[self.arch] // max(1, self.shared_bytes + system)
        registers = _REGISTERS // (-(-max(self.registers, 1) // 8) * 8 * self.threads)  # given out by eights
        return min(shared, registers, self._most // self.threads, _BLOCKS.get(self.arch, 32))

    @property
    def resident(self) -> int:
        """The threads that fit a multiprocessor: an estimate."""
        return self.blocks * self.threads

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


class _AbsentDriver:
    """The device that ``JITFunction.run`` asks for while launches are kept: of an architecture, and not there."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:  # a key of each kernel's binders: those of real devices are not touched
        return f"absent sm_{self._target.arch}"

    def get_current_stream(self, device: object) -> int:
        return 0


def _target(arch: int) -> GPUTarget:
    return GPUTarget("cuda", arch, 32)


@lru_cache(maxsize=16)
def _defaults(arch: int) -> dict[str, Any]:
    return vars(make_backend(_target(arch)).parse_options({}))


def _launch(
    kernel: JITFunction, arch: int, signature: dict[str, Any], constexprs: Any, options: Any, attrs: Any
) -> Launch:
    default = _defaults(arch)
    stated = {k: v for k, v in vars(options).items() if v != default[k] or k in ("num_warps", "num_stages")}
    given, key = tuple(sorted(stated.items())), f"{signature} {constexprs} {attrs}"
    folder = _folder(ASTSource(kernel, signature, constexprs, attrs), arch, vars(options))
    return Launch(kernel, kernel.__name__, key, signature, constexprs, attrs, given, folder)


def _folder(source: ASTSource, arch: int, options: dict[str, Any]) -> str:
    """Return the hash by which ``triton.compile`` looks for a kernel, worked out as it does."""
    backend = make_backend(_target(arch))
    parsed = backend.parse_options({**options, **source.parse_options()})
    key = get_cache_key(source, backend, parsed, env_vars=get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode("utf-8")).hexdigest()


@contextmanager
def recording(arch: int = 90, processors: int = 132) -> Iterator[dict[Launch, None]]:
    """Keep launches (each once, in order) inside, and do not run them. In all threads; one recording at a time.

    CPU tensors stand for those of a GPU of ``arch`` (80 is sm_80) with so many multiprocessors: its table gives the
    configurations, and persistent grids are as large as there. A process whose first use of the ``triton`` backend is
    inside can use it on CPU tensors, as in ``use_backend("triton")``; results are not computed.
    """
    kept: dict[Launch, None] = {}

    def keep(
        self: JITFunction, key: str, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any, warmup: Any
    ) -> None:
        kept[_launch(self, arch, signature, constexprs, options, attrs)] = None  # None: run launches nothing

    # Private: the active driver cannot be asked for without a GPU, and what run would compile is told to no hook whole.
    original, active = JITFunction._do_compile, driver._active
    JITFunction._do_compile = keep
    driver.set_active(_AbsentDriver(_target(arch)))
    try:
        with standing_for(divmod(arch, 10), processors):
            yield kept
    finally:
        JITFunction._do_compile, driver._active = original, active


def _source(launch: Launch) -> ASTSource:
    return ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attrs)


def compiled(launch: Launch, arch: int) -> Any:
    """Return Triton's compiled kernel; its ``hash`` is the name of its folder in the cache."""
    return triton.compile(_source(launch), target=_target(arch), options=dict(launch.options))


def build(launch: Launch, arch: int, listing: bool = True) -> Built:
    """Compile for an architecture (80 is sm_80); no device is needed. Without ``listing``, ``limits`` are left empty.

    The result goes to Triton's cache on disk, where the same launch on such a GPU finds it.

    Raises:
        whatever Triton raises when a kernel does not compile, or does not fit.
    """
    made = compiled(launch, arch)
    ptx = made.asm["ptx"]
    widest_load, widest_store = access_bytes(ptx)
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
        widest_load=widest_load,
        widest_store=widest_store,
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
