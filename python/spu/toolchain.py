"""The CUDA compiler that a build of ``spu._cuda`` would use on this machine. Looks only."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["OLDEST_NVCC", "find_nvcc", "install_nvcc", "nvcc_version"]

OLDEST_NVCC = (12, 4)


def find_nvcc() -> str | None:
    """The nvcc that the build would take (build_backend/spu_cuda.py); None if there is none."""
    named = os.environ.get("NVCC")
    if named:
        return shutil.which(named)
    candidates = [Path(home) / "bin/nvcc" for home in map(os.environ.get, ("CUDA_HOME", "CUDA_PATH")) if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for folder in filter(None, sys.path):
        candidates += sorted((Path(folder) / "nvidia").glob("*/bin/nvcc"))
    return next((str(path) for path in candidates if path.is_file()), None)


def nvcc_version(path: str) -> tuple[int, int] | None:
    """(major, minor), or None if it does not run."""
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def install_nvcc(pip: str) -> str:
    """The command that installs nvcc and what it needs, of the CUDA version that this torch, and so the driver, is for.

    Args:
        pip: the command that is pip here.
    """
    try:
        import torch

        major = (torch.version.cuda or "").split(".")[0]
    except Exception:
        major = ""
    suffix = {"": "", "12": "-cu12", "11": "-cu12"}.get(major, f"=={major}.*")
    packages = " ".join(shlex.quote(f"nvidia-cuda-{part}{suffix}") for part in ("nvcc", "runtime", "cccl"))
    return f"{pip} install {packages}"
