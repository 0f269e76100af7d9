"""Shared by the builds of all extensions: settings, compiler, flags, places, and the syntax of ninja files."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent.parent

# Without build isolation nobody else checks, and setuptools' own words would be "project.license must be valid".
if int(setuptools.__version__.split(".")[0]) < 77:
    raise RuntimeError(
        f"building spu needs setuptools >= 77, this is {setuptools.__version__}: pip install -U setuptools"
    )

TORCH_TARGET_VERSION = "0x020b000000000000"  # torch 2.11: the oldest one whose stable ABI the op libraries use
PY_LIMITED_API = "0x030a0000"  # CPython 3.10

IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# Contraction is off everywhere: a kernel that wants a fused multiply-add says so, and all builds round alike.
COMMON_FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffp-contract=off",
    "-Wall", "-Wextra", f"-DSPU_X86={int(IS_X86)}", f"-I{ROOT / 'csrc'}",
]  # fmt: skip


def build_mode() -> str:
    """Return the value of SPU_BUILD: ``"auto"`` (default), ``"0"`` (never compile) or ``"1"`` (compile or fail).

    Raises:
        ValueError: on any other value.
    """
    mode = os.environ.get("SPU_BUILD", "").strip().lower() or "auto"
    if mode not in ("auto", "0", "1"):
        raise ValueError(f"SPU_BUILD={mode!r}: use 0 (never compile), 1 (compile or fail) or auto (the default)")
    return mode


def cuda_mode() -> str:
    """Return the value of SPU_CUDA: ``"auto"`` (default: if nvcc and a GPU are there), ``"0"`` or ``"1"`` (or fail).

    Raises:
        ValueError: on any other value.
    """
    mode = os.environ.get("SPU_CUDA", "").strip().lower() or "auto"
    if mode not in ("auto", "0", "1"):
        raise ValueError(f"SPU_CUDA={mode!r}: use 0 (no CUDA kernels), 1 (build them or fail) or auto (the default)")
    return mode


def find_compiler() -> list[str] | None:
    """Return the C++ compiler as an argument list: ``$CXX``, else the first of g++, clang++, c++ on PATH, or None."""
    named = os.environ.get("CXX", "").split()
    if named:
        return named if shutil.which(named[0]) else None
    for name in ("g++", "clang++", "c++"):
        path = shutil.which(name)
        if path is not None:
            return [path]
    return None


def module_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def python_include() -> str:
    return f"-isystem{sysconfig.get_paths()['include']}"


def stable_flags() -> list[str]:
    """Return the compiler flags of a library over torch's stable ABI and Python's limited API."""
    torch_folder = module_folder("torch")
    assert torch_folder is not None  # wanted_extensions() has looked
    return [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-DPy_LIMITED_API={PY_LIMITED_API}",
        f"-isystem{torch_folder / 'include'}", python_include(),
    ]  # fmt: skip


def torch_link_flags() -> list[str]:
    torch_folder = module_folder("torch")
    assert torch_folder is not None
    # No rpath: `import spu` imports torch first, which has the library loaded under this name.
    return [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]


def say(message: str) -> None:
    print(f"spu: {message}", file=sys.stderr, flush=True)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def escape(path: str | Path) -> str:
    """Escape a path for a ninja file."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def shell(arguments: list[str]) -> str:
    """Escape a command for a ninja file."""
    return shlex.join(arguments).replace("$", "$$")
