"""The ``triton`` backend of spu's ops: an implementation by op name, in the signatures of ``spu.ops.schema``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import linear
from .arith import INTERPRET


def interpreted() -> bool:
    """Whether kernels run interpreted (TRITON_INTERPRET=1): then on CPU tensors too."""
    return bool(INTERPRET.value)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep_preact: bool) -> Any:
    return linear.linear_fwd(x, weight, bias, activation, keep_preact)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"linear": _linear, "linear_dw_": linear.linear_dw_}
