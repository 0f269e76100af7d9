"""The CUDA backend without a GPU: csrc/cuda, but for the tensor-core products, compiled for the CPU and run there.

``cuda_host/host_sim.h`` stands for the CUDA runtime: a fiber for each thread of a block. The library registers the
``cuda`` overloads for CPU tensors, so the op files (checks, launches, lists of tensors) run as well as the kernels.
What stays unexecuted: ``gemm_mma.cu``, ``gemm_wgmma.cu`` and ``gemm_fusion.h``, the choice between them in
``gemm.cpp``, ``runtime.cpp``, and the device's own half conversions in ``vector.h`` (two lines of assembly).
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc/cuda"
TORCH = Path(torch.__file__).parent
KERNELS = ("pointwise.cu", "codec.cu", "optim.cu", "gemm_fma.cu", "transfer.cu")
OPS = ("gemm.cpp", "op_linear.cpp", "op_codec.cpp", "op_optim.cpp", "module.cpp")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DSPU_HOST_SIM", "-Wall", "-Wextra",
         "-Werror", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda_host'}"]  # fmt: skip


def missing() -> str:
    """Why the simulation cannot be built here; empty if it can."""
    if shutil.which("g++") is None or not CUDA.is_dir():
        return "needs g++ and the sources in csrc/cuda"
    if not (TORCH / "include/torch/csrc/stable/library.h").exists():
        return "needs torch's stable ABI headers"
    return ""


def build(folder: Path) -> Path:
    """Compiles the library into ``folder``; returns its path."""
    stable = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030a0000"]
    stable += [f"-isystem{TORCH / 'include'}", f"-isystem{sysconfig.get_paths()['include']}"]
    unity = folder / "ops.cpp"  # one file: torch's headers are most of the compiler's work
    sources = [*(CUDA / name for name in OPS), ROOT / "tests/cuda_host/runtime_sim.cpp"]
    unity.write_text(
        "#define PY_SSIZE_T_CLEAN\n#include <Python.h>\n" + "".join(f'#include "{path}"\n' for path in sources)
    )
    jobs = [(unity, ["-O0", *stable]), *((CUDA / name, []) for name in KERNELS)]

    def compile_one(job: tuple[Path, list[str]]) -> str:
        source, extra = job
        command = ["g++", *FLAGS, *extra, "-x", "c++", "-c", str(source), "-o", str(folder / f"{source.name}.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stderr if done.returncode else ""

    with ThreadPoolExecutor(2) as pool:
        errors = [error for error in pool.map(compile_one, jobs) if error]
    assert not errors, errors[0][-4000:]
    objects = [str(folder / f"{source.name}.o") for source, _ in jobs]
    library = folder / "_cuda.so"
    link = ["g++", "-shared", *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-o", str(library)]
    subprocess.run(link, check=True, capture_output=True, text=True)
    return library


class AsCpu:
    """``torch.ops.spu`` in which ``.cpu`` names the cuda overload: tests of the CPU kernels then test these.

    ``device``: where the kernels run; tensors are brought there, and what was changed or returned comes back.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    def __getattr__(self, name: str) -> SimpleNamespace:
        op = getattr(torch.ops.spu, name)
        return SimpleNamespace(cpu=op.cuda if self._device == "cpu" else self._moved(op.cuda), reference=op.reference)

    def _moved(self, op: Any) -> Any:
        def there(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                # keeps the strides: a copy of the storage, seen the same way
                storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())  # type: ignore[call-overload]
                return storage.to(self._device).as_strided(value.shape, value.stride(), value.storage_offset())
            return [there(one) for one in value] if isinstance(value, (list, tuple)) else value

        def back(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.cpu()
            return type(value)(back(one) for one in value) if isinstance(value, (list, tuple)) else value

        def run(*arguments: Any) -> Any:
            moved = [there(one) for one in arguments]
            result = back(op(*moved))
            for argument, schema, on_device in zip(arguments, op._schema.arguments, moved):
                if schema.alias_info is not None and schema.alias_info.is_write:
                    pairs = zip(argument, on_device) if isinstance(argument, (list, tuple)) else [(argument, on_device)]
                    for target, value in pairs:
                        target.copy_(value.cpu())
            return result

        return run
