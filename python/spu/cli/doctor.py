"""A report of what works on this machine, what does not, why, and the command that adds it.

``report`` only looks: it installs nothing and prints nothing. Every probe is guarded, and nothing of torch or spu is
imported before the probe that is about it, so that an installation that is broken anywhere can be reported on.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import spu

__all__ = ["Row", "report"]

# Packages that some part of spu needs: for what, and the versions that work.
_PACKAGES: dict[str, tuple[str, str]] = {
    "numpy": ("arrays", "1.26"),
    "safetensors": ("reading models", "0.5"),
    "transformers": ("Hugging Face models, spu train", "5.0"),
    "rich": ("the progress display of spu train", "13"),
    "typer": ("the spu command", "0.12"),
    "matplotlib": ("pictures of runs and plans", "3.8"),
    "pyyaml": ("files of options for the spu command", "6"),
}
_MODULES = {"pyyaml": "yaml"}
_TRITON = ("kernels on CUDA devices", "3.6,<3.10")
_COMPILERS = {
    "apt-get": "apt-get install -y g++",
    "dnf": "dnf install -y gcc-c++",
    "pacman": "pacman -S --noconfirm gcc",
    "xcode-select": "xcode-select --install",
}


@dataclass(frozen=True)
class Row:
    """One thing that spu can use.

    Attributes:
        name: what it is.
        works: whether it can be used here.
        detail: the version or place of what works, the reason why something does not.
        fix: the one command that adds it; empty where it works, and where no command would help.
    """

    name: str
    works: bool
    detail: str
    fix: str = ""


def report() -> list[Row]:
    """Probe everything; takes a few seconds, since it imports what it reports on. Never raises for a broken part."""
    probes: dict[str, Callable[[], list[Row]]] = {
        "python": _python,
        "torch": _torch,
        "packages": _packages,
        "CUDA device": _cuda,
        "OpenMP": _openmp,
        "C++ compiler": _compiler,
        "spu._host": _simulator,
        "backends": _backends,
        "kernel choice": _choice,
        "CUDA graphs": _graphs,
    }
    rows: list[Row] = []
    for name, probe in probes.items():
        try:
            rows += probe()
        except Exception as error:
            rows.append(Row(name, False, f"the check itself failed: {_text(error)}"))
    return rows


# Probes.


def _python() -> list[Row]:
    return [Row("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")]


def _torch() -> list[Row]:
    fix = f"{_python_command()} -m pip install --upgrade 'torch>=2.11'"
    try:
        import torch
    except Exception as error:
        return [Row("torch", False, f"cannot be imported: {_text(error)}", f"{fix} --force-reinstall")]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    if _numbers(torch.__version__) < (2, 11):
        return [Row("torch", False, f"{torch.__version__} ({build}); spu needs 2.11 or later", fix)]
    return [Row("torch", True, f"{torch.__version__} ({build}), {torch.get_num_threads()} threads")]


def _openmp() -> list[Row]:
    """Return a row about threads that wait for each other: they spin for a while, which takes what others need where
    cores are shared (docs/performance.md).
    """
    from spu.devices.host import cores_of_others, usable_cores

    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    for name, value in quiet.items():
        if os.environ.get(name, "").strip().upper() == value:
            return [Row("OpenMP", True, f"waiting threads sleep ({name}={value})")]
    others, cores = cores_of_others(), len(usable_cores())
    if others is None or cores < 2:
        return [Row("OpenMP", True, "waiting threads spin for a while; who else uses the cores is not known here")]
    text = f"waiting threads spin for a while, and others use {others:.1f} of {cores} cores now"
    if others < 0.25 * cores:
        return [Row("OpenMP", True, text)]
    return [Row("OpenMP", False, f"{text}: steps may take several times as long", "export OMP_WAIT_POLICY=PASSIVE")]


def _packages() -> list[Row]:
    """Return one row, with one command for all packages that are missing, broken or too old."""
    there, faults, wanted = [], [], []
    needed = _PACKAGES | ({"triton": _TRITON} if _has_cuda() and sys.platform == "linux" else {})
    for name, (purpose, versions) in needed.items():
        try:
            version = metadata.version(name)
            importlib.import_module(_MODULES.get(name, name))
        except Exception as error:
            missing = isinstance(error, metadata.PackageNotFoundError)
            fault = "is not installed" if missing else f"cannot be imported: {_text(error)}"
        else:
            there.append(f"{name} {version}")
            first, _, before = versions.partition(",<")
            fits = _numbers(version) >= _numbers(first) and (not before or _numbers(version) < _numbers(before))
            fault = "" if fits else f"is {version}, not >={versions}"
        if fault:
            faults.append(f"{name} {fault} (for {purpose})")
            wanted.append(f"'{name}>={versions}'")
    if not faults:
        return [Row("packages", True, ", ".join(there))]
    force = "--force-reinstall " if any("imported" in fault for fault in faults) else ""
    fix = f"{_python_command()} -m pip install {force}{' '.join(wanted)}"
    return [Row("packages", False, "; ".join(faults), fix)]


def _cuda() -> list[Row]:
    import torch

    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        text = ", ".join(
            f"cuda:{i} {gpu.name} {gpu.total_memory / 1e9:.1f} GB (sm_{gpu.major}{gpu.minor})"
            for i, gpu in enumerate(gpus)
        )
        return [Row("CUDA device", True, text)]
    if shutil.which("nvidia-smi") is None and not Path("/proc/driver/nvidia/version").exists():
        return [Row("CUDA device", False, "no NVIDIA driver is installed; spu runs on the CPU")]
    if torch.version.cuda is None:
        why = "there is an NVIDIA driver, but this torch is built for the CPU only"
        return [Row("CUDA device", False, why, f"{_python_command()} -m pip install --force-reinstall torch")]
    why = f"there is an NVIDIA driver, but torch (CUDA {torch.version.cuda}) finds no device it can use"
    return [Row("CUDA device", False, f"{why}; see which driver and devices there are", "nvidia-smi")]


def _compiler() -> list[Row]:
    named = os.environ.get("CXX", "").split()
    candidates = named[:1] or ["g++", "clang++", "c++"]
    path = next((found for name in candidates if (found := shutil.which(name))), None)
    if path is not None:
        return [Row("C++ compiler", True, path)]
    why = f"$CXX is {named[0]!r}, which is not there" if named else f"none of {', '.join(candidates)} is on the PATH"
    fix = next((command for program, command in _COMPILERS.items() if shutil.which(program)), "")
    root = fix.startswith("xcode") or (hasattr(os, "geteuid") and os.geteuid() == 0)
    detail = f"{why}; the C++ kernels are built with one"
    return [Row("C++ compiler", False, detail, fix if root or not fix else f"sudo {fix}")]


def _simulator() -> list[Row]:
    try:
        importlib.import_module("spu._host")
    except Exception as error:
        detail = f"the simulator and file transfers in C++ cannot be imported: {_text(error)}; spu does without, slower"
        return [Row("spu._host", False, detail, _build())]
    return [Row("spu._host", True, "the simulator and file transfers in C++")]


def _backends() -> list[Row]:
    """Return a row a backend, as the dispatcher judges it."""
    try:
        from spu.ops import backends

        found = backends()
    except Exception as error:
        return [Row("backends", False, f"spu.ops cannot be imported: {_text(error)}", _build())]
    rows = []
    for name, status in found.items():
        if status.available:
            rows.append(Row(f"backend {name}", True, _kernels_of(name)))
        else:
            rows.append(Row(f"backend {name}", False, status.reason, _fix(name, status.reason)))
    return rows


def _kernels_of(backend: str) -> str:
    if backend == "cpu":
        return f"C++ kernels for {importlib.import_module('spu._C').isa()}"
    if backend == "cuda":
        module = importlib.import_module("spu._cuda")
        library = module.cublaslt()
        by_library = (
            f", cuBLASLt {library // 10000}.{library // 100 % 100}" if isinstance(library, int) else f"; {library}"
        )
        return f"CUDA C++ kernels for sm_{', sm_'.join(module.architectures().split(';'))}{by_library}"
    return "plain torch" if backend == "reference" else "available"


def _fix(backend: str, reason: str) -> str:
    """Return the command that makes a backend work; empty where it needs a CUDA device and there is none."""
    if backend == "cpu":
        return "unset SPU_CPU_ISA" if "SPU_CPU_ISA" in reason else _build()
    if backend not in ("triton", "cuda") or not _has_cuda():
        return ""
    if backend == "triton" and "its launcher" in reason:
        return importlib.import_module("spu.ops.dispatch").BUILD_LAUNCHER  # type: ignore[no-any-return]
    return f"{_python_command()} -m pip install 'triton>={_TRITON[1]}'" if backend == "triton" else _build(cuda=True)


def _graphs() -> list[Row]:
    """Return whether microbatches can be captured (``graphs=``): tried on each CUDA device with one addition."""
    name = "CUDA graphs"
    if not _has_cuda():
        return [Row(name, False, "there is no CUDA device to capture for; microbatches run eagerly")]
    import torch

    from spu.devices.capture import CudaCapture

    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        with torch.cuda.device(device):
            value = torch.zeros(1, device=device, dtype=torch.float32)
            torch.cuda.synchronize(device)
            replay = CudaCapture(device).record(partial(_add_one, value), ())
            replay()
            replay()
            found = value.item()
        if found != 2:  # what is captured is not run
            return [Row(name, False, f"an addition that was replayed twice gave {found:g} on cuda:{index}")]
    return [Row(name, True, "the last stage's microbatches, with 1f1b and two or more a step (graphs='auto')")]


def _add_one(value: Any) -> None:
    value.add_(1)


def _choice() -> list[Row]:
    """Return a row a CUDA device: what the tables choose for its products."""
    if not _has_cuda():  # the rows above say why
        return []
    import torch

    from spu.kernels import table
    from spu.ops import choose_backend, forced_backend

    rows = []
    shapes = {"skinny": (16, 4096, 4096), "medium": (2048, 4096, 4096), "large": (8192, 8192, 8192)}
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        used = table.tables(capability)[0]
        probe = torch.empty(1, dtype=torch.float16, device=f"cuda:{index}")
        parts = []
        for name, shape in shapes.items():
            config = table.config_of(capability, "linear", torch.float16, shape)
            backend = forced_backend() or choose_backend(probe, op="linear", shape=shape)
            tile = f" ({config.kind} {config.block_m}x{config.block_n}x{config.block_k})"
            parts.append(f"{name} {backend}{tile if backend == 'triton' else ''}")
        origin = ", ".join(f"{key} {value}" for key, value in used.facts.items() if key in ("device", "date"))
        text = f"linear fp16: {'; '.join(parts)}; table {used.arch} {used.origin} {origin}".rstrip()
        advice = "" if used.origin == "measured" else "; `spu tune` measures this device"
        rows.append(Row(f"kernels on cuda:{index}", True, text + advice))
    return rows


# Commands.


def _python_command() -> str:
    """Return the Python that is running: a bare pip or python may be another's."""
    return shlex.quote(sys.executable or "python")


def _build(*, cuda: bool = False) -> str:
    """Return the command that builds the extensions, with what an isolated build would install by itself."""
    steps = [f"{_python_command()} -m pip install 'setuptools>=77' 'pybind11>=3.0,<4' 'ninja>=1.11'"]
    variables = "SPU_BUILD=1"
    if cuda:
        from spu.ops import cuda_library

        steps += [_install_nvcc(), f"{_python_command()} -m pip install --no-deps nvidia-cutlass==4.2.0.0"]
        variables += f" SPU_CUDA=1 SPU_CUDA_ARCHS='{cuda_library.wanted()}'"
    root = Path(spu.__file__).resolve().parents[2]
    if _is_source(root):
        steps += [f"cd {shlex.quote(str(root))}", f"{variables} {_python_command()} setup.py build_ext --inplace"]
    else:
        options = "--force-reinstall --no-deps --no-cache-dir --no-build-isolation"
        steps.append(f"{variables} {_python_command()} -m pip install {options} {shlex.quote(_installed_from())}")
    return " && ".join(filter(None, steps))


def _install_nvcc() -> str:
    """Return the command that installs nvcc of torch's CUDA version; empty where there is one on the PATH."""
    if os.environ.get("NVCC") or os.environ.get("CUDA_HOME") or shutil.which("nvcc"):
        return ""
    import torch

    major = (torch.version.cuda or "").split(".")[0]
    suffix = {"": "", "12": "-cu12"}.get(major, f"=={major}.*")
    packages = (shlex.quote(f"nvidia-cuda-{part}{suffix}") for part in ("nvcc", "runtime", "cccl"))
    return f"{_python_command()} -m pip install {' '.join(packages)}"


def _installed_from() -> str:
    """Return the source tree that spu was installed from, if pip noted one and it is there; else "."."""
    try:
        noted = metadata.distribution("spu-torch").read_text("direct_url.json")
        root = Path(unquote(urlparse(json.loads(noted or "{}").get("url", "")).path))
    except (metadata.PackageNotFoundError, ValueError):
        return "."
    return str(root) if _is_source(root) else "."


def _is_source(root: Path) -> bool:
    return (root / "setup.py").exists() and (root / "csrc").is_dir()


# Small things.


def _has_cuda() -> bool:
    try:
        import torch

        return torch.cuda.is_available()
    except Exception:
        return False


def _text(error: BaseException) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, without trailing zeros: (2, 13) for "2.13.0+cpu"."""
    match = re.match(r"\d+(\.\d+)*", str(version))
    parts = [int(part) for part in match[0].split(".")] if match else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)
