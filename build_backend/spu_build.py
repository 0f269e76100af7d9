"""In-tree PEP 517 backend: setuptools, plus build requirements that follow what is really compiled.

The static requirement is setuptools alone. torch (its headers and one library), pybind11 and ninja are asked for only
when the extensions are going to be compiled, so that ``SPU_BUILD=0 pip install .`` downloads none of them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import setuptools
from setuptools import build_meta

ROOT = Path(__file__).resolve().parent.parent

# Without build isolation nobody else checks, and setuptools' own words would be "project.license must be valid".
if int(setuptools.__version__.split(".")[0]) < 77:
    raise RuntimeError(
        f"building spu needs setuptools >= 77, this is {setuptools.__version__}: pip install -U setuptools"
    )

# Pinned: an unpinned torch in an isolated build could resolve to another version than the tested one, and is 200 MB to
# 3 GB to get wrong. The extension built with it runs on torch 2.11 and later (stable ABI).
COMPILE_REQUIREMENTS = ["torch==2.13.0", "pybind11>=3.0,<4", "ninja>=1.11"]
CUDA_REQUIREMENTS = ["nvidia-cutlass==4.2.0.0"]  # headers of the matrix products, when spu._cuda is going to be built


def build_mode() -> str:
    """The value of SPU_BUILD: ``"auto"`` (default), ``"0"`` (never compile) or ``"1"`` (compile or fail).

    Raises:
        ValueError: on any other value.
    """
    mode = os.environ.get("SPU_BUILD", "").strip().lower() or "auto"
    if mode not in ("auto", "0", "1"):
        raise ValueError(f"SPU_BUILD={mode!r}: use 0 (never compile), 1 (compile or fail) or auto (the default)")
    return mode


def cuda_mode() -> str:
    """The value of SPU_CUDA: ``"auto"`` (default: where nvcc and a GPU are), ``"0"`` (no) or ``"1"`` (build or fail).

    Raises:
        ValueError: on any other value.
    """
    mode = os.environ.get("SPU_CUDA", "").strip().lower() or "auto"
    if mode not in ("auto", "0", "1"):
        raise ValueError(f"SPU_CUDA={mode!r}: use 0 (no CUDA kernels), 1 (build them or fail) or auto (the default)")
    return mode


def find_compiler() -> list[str] | None:
    """The C++ compiler as an argument list: ``$CXX``, else the first of g++, clang++, c++ on PATH; None if none is."""
    named = os.environ.get("CXX", "").split()
    if named:
        return named if shutil.which(named[0]) else None
    for name in ("g++", "clang++", "c++"):
        path = shutil.which(name)
        if path is not None:
            return [path]
    return None


def _compile_requirements() -> list[str]:
    wanted = build_mode() == "1" or (build_mode() == "auto" and find_compiler() is not None)
    if not wanted:
        return []
    from spu_cuda import wants_cuda

    return [*COMPILE_REQUIREMENTS, *(CUDA_REQUIREMENTS if wants_cuda() else [])]


def _drop_stale_library() -> None:
    # setuptools copies build/lib* into the wheel whole: a module deleted from the sources would live on in it.
    for stale in (ROOT / "build").glob("lib*"):
        shutil.rmtree(stale, ignore_errors=True)


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_compile_requirements()]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_compile_requirements()]


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    return list(build_meta.get_requires_for_build_sdist(config_settings))


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: dict[str, Any] | None = None) -> str:
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: dict[str, Any] | None = None) -> str:
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    _drop_stale_library()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: dict[str, Any] | None = None) -> str:
    return build_meta.build_sdist(sdist_directory, config_settings)
