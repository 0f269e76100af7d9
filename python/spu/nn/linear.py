"""``Linear``: nn.Linear, with an activation, on the fused op."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spu.nn.fp32 import NEVER, PAIR, by_torch
from spu.ops import ACTIVATIONS
from spu.ops.linear import fused_linear_act, torch_linear_act
from spu.ops.plain import plain, takes
from spu.ops.reference.linear import torch_activation

__all__ = ["Linear", "fused_linear", "torch_linear"]


class Linear(nn.Linear):
    """``act(x @ weight.T + bias)`` in one op; parameters, state_dict keys and initialisation are nn.Linear's.

    Args:
        activation: "none", "relu", "gelu" (exact), "gelu_tanh" or "silu"; the others are nn.Linear's.

    Raises:
        ValueError: for an unknown activation.
    """

    __constants__ = [*nn.Linear.__constants__, "activation"]  # noqa: RUF012
    activation: str = "none"
    # of the computation; set by accelerate(precision=...). (No annotation: TorchScript would read it.)
    spu_dtype = None  # type: torch.dtype | None

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
        """Compute input [..., in_features] -> [..., out_features]."""
        if torch.jit.is_scripting():
            return _scripted(input, self.weight, self.bias, self.activation)
        else:  # TorchScript compiles the branch that it takes, and no more
            y = fused_linear(self, input, self.activation)
            return torch_linear(self, input, self.activation) if y is None else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


def _scripted(input: Tensor, weight: Tensor, bias: Optional[Tensor], activation: str) -> Tensor:  # noqa: UP045
    y = F.linear(input, weight, bias)
    if activation == "relu":
        y = F.relu(y)
    elif activation == "gelu":
        y = F.gelu(y)
    elif activation == "gelu_tanh":
        y = F.gelu(y, approximate="tanh")
    elif activation == "silu":
        y = F.silu(y)
    return y


def fused_linear(module: nn.Module, x: Tensor, activation: str, transposed: bool = False) -> Tensor | None:
    """Compute act(x @ weight.T + bias) with a module's parameters, in its ``spu_dtype`` (if any), and return x's dtype.

    Args:
        module: with ``weight`` and ``bias`` (or None).
        transposed: the weight is [in, out].

    Returns:
        None where torch's own ops must serve: for what ``ops.plain`` names, and complex and integer layers. Where they
        are faster (`spu.nn.fp32`), their result.
    """
    weight, bias, dtype = module.weight, module.bias, getattr(module, "spu_dtype", None)
    if not (takes(x, weight, bias) and x.dtype.is_floating_point and weight.dtype.is_floating_point):  # type: ignore
        return None
    work = x.numel() * weight.shape[1 if transposed else 0]  # type: ignore[index, operator]
    if by_torch(x, (weight, bias), dtype, work, NEVER if activation == "none" else PAIR):  # type: ignore[arg-type]
        return torch_activation(F.linear(x, weight.t() if transposed else weight, bias), activation)  # type: ignore
    y = fused_linear_act(x, weight, bias, activation, dtype, transposed)  # type: ignore[arg-type]
    return y if dtype is None else y.to(x.dtype)


def torch_linear(module: nn.Module, x: Tensor, activation: str, transposed: bool = False) -> Tensor:
    """Compute the same by torch's own ops. ``spu_dtype`` holds for plain tensors only: others have a precision of their
    own.
    """
    weight, bias, dtype = module.weight, module.bias, getattr(module, "spu_dtype", None)
    if dtype is None or not plain(x, weight, bias) or not x.dtype.is_floating_point:  # type: ignore[arg-type]
        return torch_activation(F.linear(x, weight.t() if transposed else weight, bias), activation)  # type: ignore
    return torch_linear_act(x, weight, bias, activation, dtype, transposed).to(x.dtype)  # type: ignore
