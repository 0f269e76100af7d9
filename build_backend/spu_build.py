"""In-tree PEP 517 backend: setuptools, plus build requirements for the parts that are really compiled.

The static requirement is setuptools alone. torch (its headers and one library), pybind11 and ninja are asked for only
when the extensions are going to be compiled, so that ``SPU_BUILD=0 pip install .`` downloads none of them.
"""

from __future__ import annotations

import shutil
from typing import Any

from setuptools import build_meta
from spu_cuda import wants_cuda
from spu_tools import ROOT, build_mode, find_compiler

# Pinned: an unpinned torch in an isolated build could resolve to another version than the tested one, and is 200 MB to
# 3 GB to get wrong. The extension built with it runs on torch 2.11 and later (stable ABI).
COMPILE_REQUIREMENTS = ["torch==2.13.0", "pybind11>=3.0,<4", "ninja>=1.11"]
CUDA_REQUIREMENTS = ["nvidia-cutlass==4.2.0.0"]  # headers of the matrix products, when spu._cuda is going to be built


def _compile_requirements() -> list[str]:
    wanted = build_mode() == "1" or (build_mode() == "auto" and find_compiler() is not None)
    if not wanted:
        return []
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
