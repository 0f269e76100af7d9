"""fp32 on CPUs, outside of a training: where torch's own ops are faster than fused ones.

In 16 bits a fused op computes what torch cannot (fp32 sums, a backward that knows the loss scale) or does slowly. In
fp32 torch's products are as fast, and its derivatives need no Python, which takes 25 to 70 us a layer. What a fused op
saves, passes over memory, is more than that from some size on. Figures: docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, compiler

from spu.common.torch_private import any_autocast
from spu.ops.adopters import may_adopt
from spu.ops.dispatch import forced_backend
from spu.ops.plain import fake
from spu.ops.sink import sink_of

__all__ = ["NEVER", "PAIR", "by_torch"]

PAIR = 1 << 29
"""Multiply-adds from which a linear layer with its activation pays as one op, and an MLP of two layers."""

NEVER = 1 << 62
"""A linear layer alone."""

_ADDED = 1 << 20  # elements of a weight from which a product that adds to a gradient saves more than Python takes


def by_torch(x: Tensor, parameters: Sequence[Tensor | None], dtype: torch.dtype | None, work: int, least: int) -> bool:
    """Tell whether torch's own ops should serve a layer.

    They do not where gradients go to main gradients (a trainer's, or while there is a `spu.GradScaler`, whose gradients
    are at true scale), where there is no gradient to take, and under `use_backend`.

    Args:
        x, parameters: the layer's, of which ``spu.ops.plain.takes`` is true.
        dtype: of the computation; None: autocast's, or the tensors' own.
        work: its products' multiply-adds.
        least: from which on the fused op is faster.
    """
    if x.dtype is not torch.float32 or work >= least or not x.is_cpu or not torch.is_grad_enabled():
        return False
    if dtype not in (None, torch.float32) or (any_autocast() and torch.is_autocast_enabled("cpu")):
        return False  # torch's ops would narrow under autocast, whatever dtype was asked for
    if compiler.is_compiling() or may_adopt() or forced_backend() is not None or fake(x):
        return False
    for parameter in parameters:  # noqa: SIM110 (all() over a generator takes twice as long)
        if parameter is not None and not _is_torchs(parameter):
            return False
    return True


def _is_torchs(parameter: Tensor) -> bool:
    if parameter.dtype is not torch.float32 or sink_of(parameter) is not None:
        return False
    return parameter.numel() < _ADDED or not parameter.is_leaf or parameter.grad is None
