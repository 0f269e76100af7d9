"""Packages and extensions; everything else is in pyproject.toml. No hardware probing, no downloads.

SPU_BUILD=0 never compiles, SPU_BUILD=1 compiles or fails, the default compiles where it can (build_backend/).
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_backend"))

from spu_extensions import BuildExtensions, wanted_extensions

setup(
    packages=[*find_packages("python"), "spu.kernels"],
    # kernels/ itself is no package: `import kernels` must stay Hugging Face's.
    package_dir={"": "python", "spu.kernels": "kernels/triton"},
    ext_modules=wanted_extensions(),
    cmdclass={"build_ext": BuildExtensions},
)
