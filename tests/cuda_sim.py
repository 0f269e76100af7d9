"""The CUDA backend without a GPU: csrc/cuda, but for the tensor-core products, compiled for the CPU and run there.

``cuda_host/host_sim.h`` stands for the CUDA runtime: a fiber for each thread of a block. The library registers the
``cuda`` overloads for CPU tensors, so the op files (checks, launches, lists of tensors) run as well as the kernels.
What stays unexecuted: ``gemm_mma.cu``, ``gemm_wgmma.cu`` and ``gemm_fusion.h``, the choice between them in
``gemm.cpp``, ``runtime.cpp``, and the device's own half conversions in ``vector.h`` (two lines of assembly).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc/cuda"
TORCH = Path(torch.__file__).parent
CUBLASLT = "libcublasLt.so.13"
KERNELS = ("pointwise.cu", "codec.cu", "optim.cu", "gemm_fma.cu", "transfer.cu")
OPS = ("gemm.cpp", "cublaslt.cpp", "gemm_library.cpp", "op_linear.cpp", "op_codec.cpp", "op_mlp.cpp",
       "op_multiply.cpp", "op_optim.cpp", "module.cpp")  # fmt: skip
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
    link = ["g++", "-shared", *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ldl", "-o", str(library)]
    subprocess.run(link, check=True, capture_output=True, text=True)
    named = ["-shared", "-fvisibility=default", f"-Wl,-soname,{CUBLASLT}", "-o", str(folder / CUBLASLT)]
    source = str(ROOT / "tests/cuda_host/cublaslt_stub.cpp")
    subprocess.run(["g++", *FLAGS, *named, source], check=True, capture_output=True, text=True)
    return library


def _built() -> Path:
    """Return the path of the library in build/, made once for these sources by the process that comes first."""
    hosts = ROOT / "tests/cuda_host"
    folders = [ROOT / "csrc" / name for name in ("cuda", "math", "torch")] + [hosts]
    sources = sorted(path for folder in folders for path in folder.iterdir())
    found = hashlib.sha256(torch.__version__.encode())
    for path in sources:
        found.update(path.read_bytes())
    folder = ROOT / "build/cuda-sim" / found.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "_cuda.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists() or not (folder / CUBLASLT).exists():
            for old in folder.parent.iterdir():
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)
            with tempfile.TemporaryDirectory() as work:
                made = shutil.copy2(build(Path(work)), folder / "made.so")
                shutil.copy2(Path(work) / CUBLASLT, folder)
            made.rename(library)
    return library


def stand_in() -> Path:
    """Return the path of what stands for cuBLASLt (``cuda_host/cublaslt_stub.cpp``) beside the library."""
    return _built().parent / CUBLASLT


@lru_cache(maxsize=1)
def load() -> ModuleType:
    """Build the library and load it, once a process: its ops cannot be registered twice. The stand-in for cuBLASLt
    comes first: the library looks for one once.
    """
    ctypes.CDLL(str(stand_in()))
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(_built()))
    spec = importlib.util.spec_from_loader("_cuda", loader)
    assert spec is not None
    made = importlib.util.module_from_spec(spec)
    loader.exec_module(made)
    return made


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
