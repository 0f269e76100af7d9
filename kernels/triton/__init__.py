"""Triton kernels of spu: the parts of the ``triton`` backend, usable alone.

Importing this package does not import triton; the first call of a kernel does. Every function takes and returns
tensors on one CUDA device, or, under ``TRITON_INTERPRET=1`` (set before triton is imported), on the CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spu.kernels.accumulation import fp16_accumulation as fp16_accumulation
    from spu.kernels.codec import pack as pack
    from spu.kernels.codec import unpack as unpack
    from spu.kernels.cross_entropy import linear_ce as linear_ce
    from spu.kernels.cross_entropy import linear_ce_and_dz as linear_ce_and_dz
    from spu.kernels.cross_entropy import linear_ce_dz as linear_ce_dz
    from spu.kernels.gated import gated_dh as gated_dh
    from spu.kernels.gated import gated_dx as gated_dx
    from spu.kernels.gated import gated_dz as gated_dz
    from spu.kernels.gated import gated_linear as gated_linear
    from spu.kernels.linear import linear_db as linear_db
    from spu.kernels.linear import linear_db_ as linear_db_
    from spu.kernels.linear import linear_dw as linear_dw
    from spu.kernels.linear import linear_dw_ as linear_dw_
    from spu.kernels.linear import linear_dx as linear_dx
    from spu.kernels.linear import linear_dz as linear_dz
    from spu.kernels.linear import linear_dz_dx as linear_dz_dx
    from spu.kernels.linear import linear_fwd as linear_fwd
    from spu.kernels.linear import unscale_ as unscale_
    from spu.kernels.mlp import mlp_dz as mlp_dz
    from spu.kernels.norm import layer_norm as layer_norm
    from spu.kernels.norm import layer_norm_backward as layer_norm_backward
    from spu.kernels.norm import rms_norm as rms_norm
    from spu.kernels.norm import rms_norm_backward as rms_norm_backward
    from spu.kernels.optim import adamw_ as adamw_
    from spu.kernels.optim import grad_sqnorm as grad_sqnorm
    from spu.kernels.rows import embedding_dw_ as embedding_dw_
    from spu.kernels.rows import rotary as rotary

_NAMES = {
    "accumulation": ("fp16_accumulation",),
    "codec": ("pack", "unpack"),
    "cross_entropy": ("linear_ce", "linear_ce_and_dz", "linear_ce_dz"),
    "gated": ("gated_dh", "gated_dx", "gated_dz", "gated_linear"),
    "linear": (
        "linear_db",
        "linear_db_",
        "linear_dw",
        "linear_dw_",
        "linear_dx",
        "linear_dz",
        "linear_dz_dx",
        "linear_fwd",
        "unscale_",
    ),
    "mlp": ("mlp_dz",),
    "norm": ("layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward"),
    "optim": ("adamw_", "grad_sqnorm"),
    "rows": ("embedding_dw_", "rotary"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["available", *_HOME]


def available() -> bool:
    """Tell whether triton is installed (not whether there is a device to run it on)."""
    return importlib.util.find_spec("triton") is not None


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spu.kernels' has no attribute {name!r}")
    if not available():
        raise ImportError(f"spu.kernels.{name} needs triton: pip install 'triton>=3.6,<3.10'")
    value = getattr(importlib.import_module(f"spu.kernels.{_HOME[name]}"), name)
    globals()[name] = value
    return value
