"""Triton kernels of spu: the parts of the ``triton`` backend, usable alone.

Importing this package does not import triton; the first call of a kernel does. Every function takes and returns
tensors on one CUDA device, or, under ``TRITON_INTERPRET=1`` (set before triton is imported), on the CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spu.kernels.codec import pack as pack
    from spu.kernels.codec import unpack as unpack
    from spu.kernels.linear import linear_dw_ as linear_dw_
    from spu.kernels.linear import linear_fwd as linear_fwd

__all__ = ["available", "linear_dw_", "linear_fwd", "pack", "unpack"]

_HOME = {"linear_fwd": "linear", "linear_dw_": "linear", "pack": "codec", "unpack": "codec"}


def available() -> bool:
    """Whether triton is installed (not whether there is a device to run it on)."""
    return importlib.util.find_spec("triton") is not None


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spu.kernels' has no attribute {name!r}")
    if not available():
        raise ImportError(f"spu.kernels.{name} needs triton: pip install 'triton>=3.6,<3.10'")
    value = getattr(importlib.import_module(f"spu.kernels.{_HOME[name]}"), name)
    globals()[name] = value
    return value
