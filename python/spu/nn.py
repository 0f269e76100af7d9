"""Drop-in modules, and ``accelerate``: the same model on fused ops."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from .ops import ACTIVATIONS, linear_act

_Model = TypeVar("_Model", bound=nn.Module)
_MARK = "_spu_accelerated"


class Linear(nn.Linear):
    """``act(x @ weight.T + bias)`` in one op; parameters, state_dict keys and initialisation are nn.Linear's.

    Args:
        activation: "none", "relu", "gelu" (exact), "gelu_tanh" or "silu"; the others are nn.Linear's.

    Raises:
        ValueError: for an unknown activation.
    """

    activation: str = "none"

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
        return linear_act(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


def accelerate(model: _Model) -> _Model:
    """Puts every ``nn.Linear`` of the model on the fused op, in place, and returns the model.

    Only exact ``nn.Linear`` instances change, and only in class: parameters, hooks, training mode and state_dict keys
    stay the same objects. ``restore`` undoes it.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
            setattr(module, _MARK, True)
    return model


def restore(model: _Model) -> _Model:
    """Undoes ``accelerate``, in place; modules that were built as ``spu.nn.Linear`` stay."""
    for module in model.modules():
        if type(module) is Linear and module.__dict__.pop(_MARK, False):
            module.__class__ = nn.Linear  # type: ignore[assignment]
    return model
