"""``Linear``: nn.Linear, with an activation, on the fused op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import ACTIVATIONS, linear_act


class Linear(nn.Linear):
    """``act(x @ weight.T + bias)`` in one op; parameters, state_dict keys and initialisation are nn.Linear's.

    Args:
        activation: "none", "relu", "gelu" (exact), "gelu_tanh" or "silu"; the others are nn.Linear's.

    Raises:
        ValueError: for an unknown activation.
    """

    activation: str = "none"
    spu_dtype: torch.dtype | None = None  # of the computation; set by accelerate(precision=...)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: use one of {', '.join(map(repr, ACTIVATIONS))}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features] -> [..., out_features]."""
        return fused_linear(self, input, self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


def fused_linear(module: nn.Module, x: Tensor, activation: str, transposed: bool = False) -> Tensor:
    """act(x @ weight.T + bias) with a module's parameters, in its ``spu_dtype`` and then back in x's, if it has one.

    Args:
        module: with ``weight`` and ``bias`` (or None).
        transposed: the weight is [in, out].
    """
    dtype = getattr(module, "spu_dtype", None)
    y = linear_act(x, module.weight, module.bias, activation, dtype=dtype, transposed=transposed)  # type: ignore[arg-type]
    return y if dtype is None else y.to(x.dtype)
