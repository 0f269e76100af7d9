"""The ``triton`` backend of spu's ops: an implementation by op name, in the signatures of ``spu.ops.schema``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.runtime import driver

from spu.kernels import codec, cross_entropy, gated, linear, mlp, norm, optim, rows
from spu.kernels.arith import INTERPRET


def interpreted() -> bool:
    """Tell whether kernels run interpreted (TRITON_INTERPRET=1): then on CPU tensors too."""
    return INTERPRET


def launch_problem() -> str:
    """Return why Triton cannot launch on this machine's GPUs; "" if it can.

    It builds its launcher, once, with a C compiler, Python's headers and the driver's library: the first launch would
    fail without them, in the middle of a training.
    """
    try:
        driver.active.get_current_device()
    except Exception as error:  # of a compiler, a linker, the driver
        said = str(error).strip().splitlines()
        return f"triton cannot build its launcher: {type(error).__name__}: {said[0] if said else ''}"
    return ""


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "linear": linear.linear_fwd,
    "linear_dz": linear.linear_dz,
    "linear_dx": linear.linear_dx,
    "linear_dz_dx": linear.linear_dz_dx,
    "linear_dw": linear.linear_dw,
    "linear_db": linear.linear_db,
    "linear_dw_": linear.linear_dw_,
    "linear_db_": linear.linear_db_,
    "linear_dw_db_": linear.linear_dw_db_,
    "unscale_": linear.unscale_,
    "pack": codec.pack,  # takes the header as well: it belongs to spu.ops, which adds it
    "unpack": codec.unpack,
    "adamw_": optim.adamw_,
    "grad_sqnorm": optim.grad_sqnorm,
    "gated_linear": gated.gated_linear,
    "gated_dz": gated.gated_dz,
    "gated_dh": gated.gated_dh,
    "gated_dx": gated.gated_dx,
    "mlp_dz": mlp.mlp_dz,
    "linear_ce": cross_entropy.linear_ce,
    "linear_ce_dz": cross_entropy.linear_ce_dz,
    "rms_norm": norm.rms_norm,
    "rms_norm_backward": norm.rms_norm_backward,
    "layer_norm": norm.layer_norm,
    "layer_norm_backward": norm.layer_norm_backward,
    "embedding_dw_": rows.embedding_dw_,
    "rotary": rows.rotary,
    "linear_ce_and_dz": cross_entropy.linear_ce_and_dz,
}
