"""What a launcher costs on the host: microseconds a call with the launch itself stubbed. Needs triton, no device.

    python benchmarks/gpu/overhead.py [--json FILE]

Measured on CPU tensors. What is left out is the C function that launches; what is put in is everything before it:
checks, table, cached plan, allocation of the outputs, and the Python of the kept kernel's launcher.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from spu import kernels
from spu.kernels.kept import Launch
from spu.kernels.product import product_kernel

LIMIT_US = 8.0  # of a launch, from its plan to the C function
_CALLS, _ROUNDS = 500, 9


def calls() -> dict[str, Callable[[], object]]:
    """One call of every launcher, at a small size: the cost does not depend on it."""
    x, w, b = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.randn(64).half()
    main, bias, one, zero = torch.zeros(64, 64), torch.zeros(64), torch.ones(1), torch.zeros(1)
    target, rows, header = torch.zeros(64, dtype=torch.int64), torch.zeros(64), bytes(64)
    wire = kernels.pack(x, "int8", header)
    state = ([x], [main], [main.clone()], [main.clone()], [main.clone()], [one])
    return {
        "linear_fwd": lambda: kernels.linear_fwd(x, w, b, "gelu", True),
        "linear_dx": lambda: kernels.linear_dx(x, w),
        "linear_dz": lambda: kernels.linear_dz(x, x, "gelu"),
        "linear_dw_": lambda: kernels.linear_dw_(x, x, main, one, zero, True, bias),
        "linear_db_": lambda: kernels.linear_db_(x, bias, one, zero, True),
        "unscale_": lambda: kernels.unscale_(x, main, one, zero, True),
        "gated_linear": lambda: kernels.gated_linear(x, w, w, "silu"),
        "gated_dz": lambda: kernels.gated_dz(x, x, x, "silu"),
        "gated_dx": lambda: kernels.gated_dx(x, x, w, w),
        "linear_ce": lambda: kernels.linear_ce(x, w, target, -100),
        "linear_ce_dz": lambda: kernels.linear_ce_dz(x, w, target, rows, rows, -100),
        "pack int8": lambda: kernels.pack(x, "int8", header),
        "unpack int8": lambda: kernels.unpack(wire, (64, 64), torch.float16, "int8"),
        "adamw_ of 1": lambda: kernels.adamw_(*state, one, zero, 1e-3, 0.9, 0.999, 1e-8, 0.1),
        "grad_sqnorm of 1": lambda: kernels.grad_sqnorm([main]),
    }


def microseconds(function: Callable[[], object]) -> float:
    """The best over rounds of the mean processor time of a call, of this thread alone."""
    for _ in range(50):
        function()
    rounds = []
    for _ in range(_ROUNDS):
        began = time.thread_time()
        for _ in range(_CALLS):
            function()
        rounds.append(1e6 * (time.thread_time() - began) / _CALLS)
    return min(rounds)


class _Driver:
    """A device of sm_90 whose driver takes every launch; each is another device than those before."""

    def __init__(self) -> None:
        self._name = f"stubbed {time.monotonic_ns()}"

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> str:  # a key of each kernel's binders: those of real devices are not touched
        return self._name

    def get_current_stream(self, device: object) -> int:
        return 0


class _Compiled(CompiledKernel):
    """One that has no code to unload."""

    def __init__(self, launcher: CudaLauncher) -> None:
        self.module, self.src, self.name, self._run, self.function, self.packed_metadata = (
            self,
            None,
            "",
            launcher,
            0,
            (),
        )

    def __del__(self) -> None:
        pass


def _compiled(launched: Callable[..., object]) -> Any:
    """What Triton compiles a kernel to, with its own launcher in Python, which ends in ``launched``."""
    launcher = object.__new__(CudaLauncher)
    launcher.launch = launched
    launcher.gsan_enabled = launcher.launch_cooperative_grid = launcher.launch_pdl = False
    launcher.num_ctas, launcher.arg_annotations, launcher.kernel_signature = 1, (), ()
    launcher.global_scratch_size = launcher.profile_scratch_size = 0
    launcher.global_scratch_align = launcher.profile_scratch_align = 1
    return _Compiled(launcher)


def forget() -> None:
    """Make every launch Triton's own once more."""
    for launch in [found for found in gc.get_objects() if type(found) is Launch]:
        launch._kept.clear()


@contextmanager
def stubbed(launched: Callable[..., object] = lambda *_: None) -> Iterator[list[Any]]:
    """Compile nothing and call ``launched`` in place of the C function that launches; else all is as on a GPU.

    The value is a list of the kernels that would have been compiled, one for each kind of arguments.
    """
    compiled: list[Any] = []

    def make(self: JITFunction, key: Any, signature: Any, device: Any, *_: Any) -> Any:
        compiled.append((self.__name__, key))
        kernel = self.device_caches[device][0][key] = _compiled(launched)
        return kernel

    original, active = JITFunction._do_compile, driver._active
    forget()
    JITFunction._do_compile = make
    driver.set_active(_Driver())
    try:
        yield compiled
    finally:
        JITFunction._do_compile, driver._active = original, active
        forget()


@contextmanager
def by_triton() -> Iterator[None]:
    """Make every launch inside Triton's own."""
    call = Launch.__call__
    Launch.__call__ = lambda self, *variable: self._by_triton(None, variable)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Launch.__call__ = call  # type: ignore[method-assign]


def measure(kept: bool = True) -> dict[str, float]:
    """Microseconds a call by launcher, from its first line to the C function that launches, which is stubbed.

    Args:
        kept: False takes Triton's own way at every launch, as if nothing were kept.
    """
    with stubbed(), nullcontext() if kept else by_triton():
        return {name: round(microseconds(function), 2) for name, function in calls().items()}


def launch_alone() -> float:
    """Microseconds of one launch of a product, from its plan to the C function: 9 tensors, 22 arguments fixed."""
    x = torch.zeros(64, 64).half()
    fixed = 64, 64, 64, 64, 1, 64, 1, 64
    options = dict.fromkeys(product_kernel.arg_names[9 + len(fixed) :], False)
    with stubbed():
        launch = Launch(product_kernel, (1, 1), fixed, options)
        return round(microseconds(lambda: launch(x, x, x, x, x, x, x, x, x)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time of the launchers.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    alone, found, before = launch_alone(), measure(), measure(kept=False)
    print(f"{'a launch alone':18} {alone:7.1f} us{'' if alone <= LIMIT_US else f'  over {LIMIT_US:.0f}'}")
    print(f"{'with its launcher':18} {'kept':>7}    {'by Triton':>9}")
    for name, took in found.items():
        print(f"{name:18} {took:7.1f} us {before[name]:7.1f} us")
    if options.json is not None:
        rows = {"a launch alone": alone, **found}
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
