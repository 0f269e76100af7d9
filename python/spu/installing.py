"""The commands that build or install what this machine lacks. Looks only; nothing of torch or spu's ops is imported."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from spu import toolchain

__all__ = ["install_compiler", "pip", "rebuild", "rebuild_cuda", "reinstall"]


def _python_command() -> str:
    return shlex.quote(sys.executable or "python")


def pip() -> str:
    """pip of the Python that is running: a bare pip may be another's."""
    return f"{_python_command()} -m pip"


def _source_tree() -> Path | None:
    """The checkout that spu is run from, if it is."""
    root = Path(__file__).resolve().parents[2]
    return root if _is_source(root) else None


def _is_source(root: Path) -> bool:
    return (root / "setup.py").exists() and (root / "csrc").is_dir()


def _installed_from() -> str:
    """The source tree that spu was installed from, if pip noted one and it is there; else "." for one to be gone to."""
    from importlib import metadata
    from urllib.parse import unquote, urlparse

    try:
        noted = metadata.distribution("spu-torch").read_text("direct_url.json")
        root = Path(unquote(urlparse(json.loads(noted or "{}").get("url", "")).path))
    except (metadata.PackageNotFoundError, ValueError):
        return "."
    return str(root) if _is_source(root) else "."


def rebuild() -> str:
    """The command that builds the extensions (a compiler has its own row)."""
    root = _source_tree()
    if root is not None:
        return f"{_build_tools()} && cd {shlex.quote(str(root))} && {_python_command()} setup.py build_ext --inplace"
    return f"{_build_tools()} && {_install_again('SPU_BUILD=1')}"


def _install_again(variables: str) -> str:
    """spu is installed from its source tree; where that is gone, from one that the command is run in."""
    options = "--force-reinstall --no-deps --no-cache-dir --no-build-isolation"
    return f"{variables} {pip()} install {options} {shlex.quote(_installed_from())}".strip()


def _build_tools() -> str:
    """What an isolated build would install by itself, beside torch."""
    return f"{pip()} install 'setuptools>=77' 'pybind11>=3.0,<4' 'ninja>=1.11'"


def rebuild_cuda() -> str:
    """The command that builds the CUDA library too, with its headers; an isolated build would not see pip's nvcc."""
    root, nvcc = _source_tree(), toolchain.find_nvcc()
    where = shlex.quote(nvcc) if nvcc else f"$(ls {shlex.quote(sysconfig.get_paths()['purelib'])}/nvidia/*/bin/nvcc)"
    if root is not None:
        headers = f"{pip()} install --no-deps nvidia-cutlass==4.2.0.0"
        build = f"SPU_CUDA=1 NVCC={where} {_python_command()} setup.py build_ext --inplace"
        return f"{_build_tools()} && {headers} && cd {shlex.quote(str(root))} && {build}"
    headers = f"{pip()} install --no-deps nvidia-cutlass==4.2.0.0"
    return f"{_build_tools()} && {headers} && {_install_again(f'SPU_BUILD=1 SPU_CUDA=1 NVCC={where}')}"


def reinstall() -> str:
    """The command that installs spu again, over a broken copy of it."""
    root = _source_tree()
    if root is not None:
        return f"{pip()} install --force-reinstall {shlex.quote(str(root))}"
    return f"{_build_tools()} && {_install_again('')}"


def install_compiler() -> str:
    """The command of this system's package manager."""
    if sys.platform == "darwin":
        return "xcode-select --install"
    sudo = "" if hasattr(os, "geteuid") and os.geteuid() == 0 else "sudo "
    managers: Iterable[tuple[str, str]] = (
        ("apt-get", "apt-get install -y g++"),
        ("dnf", "dnf install -y gcc-c++"),
        ("yum", "yum install -y gcc-c++"),
        ("zypper", "zypper install -y gcc-c++"),
        ("pacman", "pacman -S --noconfirm gcc"),
        ("apk", "apk add g++"),
    )
    for program, command in managers:
        if shutil.which(program):
            return sudo + command
    return "conda install -c conda-forge cxx-compiler"
