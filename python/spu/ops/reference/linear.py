"""The definition of the ops of a linear layer, in plain torch, on any device. The other ops: ``reference_*.py``.

16-bit operands are widened, computed in fp32 and rounded once. fp32 results are bit-equal to plain torch's: the
products are written as torch's own autograd writes them (``grad.mm(weight)``, ``grad.t().mm(x)``). fp64 is computed in
fp64, for gradcheck.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spu.common import torch_private
from spu.common.codecs import numel_of
from spu.common.dtypes import HALVES

__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "activate",
    "activate_backward",
    "autocast_enabled",
    "exact",
    "into_main_grad",
    "linear",
    "linear_db",
    "linear_db_",
    "linear_dw",
    "linear_dw_",
    "linear_dx",
    "linear_dz",
    "rows_of",
    "torch_activation",
    "unscale_",
    "wide",
]

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def autocast_enabled(device_type: str) -> bool:
    """Return torch.is_autocast_enabled(device_type); False for meta tensors, which torch refuses to answer for."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep autocast out: it would narrow the fp32 products."""

    @wraps(function)
    def run(first: Tensor, *args: Any) -> Any:
        if autocast_enabled(first.device.type):
            with torch.autocast(first.device.type, enabled=False):
                return function(first, *args)
        return function(first, *args)

    return run


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALVES else x


def rows_of(x: Tensor) -> Tensor:
    """Return [..., C] as [rows, C]."""
    return x.reshape(numel_of(x.shape[:-1]), x.shape[-1])


def torch_activation(z: Tensor, activation: str) -> Tensor:
    """Compute act(z) as torch does; "gelu" is exact (erf), "gelu_tanh" its tanh form. "none" returns z itself."""
    if activation == "none":
        return z
    if activation == "relu":
        return F.relu(z)
    if activation == "silu":
        return F.silu(z)
    assert activation in ("gelu", "gelu_tanh"), activation
    return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def activate(z: Tensor, activation: str) -> Tensor:
    """Compute act(z) below autograd; a value gives the same result at every position.

    gelu(inf) is inf, and that of -inf (-inf * 0) is NaN: torch's scalar code, its tails of vectors and its fp64 say so,
    but its fp32 vectors on CPUs give NaN for both.
    """
    y = torch_activation(z, activation)
    return y.masked_fill_(z == torch.inf, torch.inf) if activation == "gelu" else y


@exact
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep_preact: bool) -> tuple[Tensor, Tensor]:
    """Compute y = act(x @ weight.T + bias), and z in the storage dtype if ``keep_preact``, else an empty tensor."""
    z = F.linear(wide(x), wide(weight), None if bias is None else wide(bias))
    if torch_private.is_view(z):
        # Of the product's rows, for 3-d x: autograd refuses to have a view changed in place later.
        z = torch_private.unsafe_view(z, z.shape)
    y = activate(z, activation).to(x.dtype).contiguous()
    if not keep_preact:
        return y, x.new_empty(0)
    preact = z.to(x.dtype).contiguous()
    return y, preact.clone() if preact is y else preact  # outputs of an op must not alias


def activate_backward(dy: Tensor, saved: Tensor, activation: str) -> Tensor:
    """Compute dy * act'(saved). ``saved`` is z, except for relu: y."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, saved, 0)
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, saved)
    assert activation in ("gelu", "gelu_tanh"), activation
    return torch.ops.aten.gelu_backward(dy, saved, approximate="tanh" if activation == "gelu_tanh" else "none")


@exact
def linear_dz(dy: Tensor, saved: Tensor, activation: str) -> Tensor:
    """Compute dz = dy * act'(saved), rounded once. ``saved`` is z, except for relu: y."""
    return activate_backward(wide(dy), wide(saved), activation).to(dy.dtype).contiguous()


@exact
def linear_dx(dz: Tensor, weight: Tensor) -> Tensor:
    """Compute dx = dz @ weight. dz [..., N], weight [N, K] -> [..., K]."""
    dx = rows_of(wide(dz)).mm(wide(weight))
    return dx.to(dz.dtype).view(*dz.shape[:-1], weight.shape[1])


@exact
def linear_dw(dz: Tensor, x: Tensor) -> Tensor:
    """Compute dw = dz.T @ x over all rows. dz [..., N], x [..., K] -> [N, K]."""
    return rows_of(wide(dz)).t().mm(rows_of(wide(x))).to(dz.dtype)


def linear_db(dz: Tensor) -> Tensor:
    """Compute db = sum over rows of dz. [..., N] -> [N]."""
    return rows_of(wide(dz)).sum(0).to(dz.dtype)


def into_main_grad(value: Tensor, main_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, accumulate: bool) -> None:
    """Compute main_grad (+)= inv_scale * value, and found_inf = 1 if any of value is not finite. Overwrites fp32
    ``value``.
    """
    value = value.contiguous()
    if value.numel():
        # The op that GradScaler uses: one pass that multiplies and checks.
        torch_private.unscale_and_check_([value], found_inf, inv_scale)
    if accumulate:
        main_grad.add_(value)
    else:
        main_grad.copy_(value)


@exact
def linear_dw_(
    dz: Tensor, x: Tensor, main_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, accumulate: bool
) -> None:
    """Compute main_grad (+)= inv_scale * dz.T @ x, in fp32, never rounded to 16 bits."""
    product = rows_of(dz.float()).t().mm(rows_of(x.float()))
    into_main_grad(product, main_grad, inv_scale, found_inf, accumulate)


def linear_db_(dz: Tensor, main_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, accumulate: bool) -> None:
    """Compute main_grad (+)= inv_scale * sum over rows of dz, in fp32."""
    into_main_grad(rows_of(dz.float()).sum(0), main_grad, inv_scale, found_inf, accumulate)


def unscale_(grad: Tensor, main_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, accumulate: bool) -> None:
    """Compute main_grad (+)= inv_scale * grad, in fp32."""
    value = grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    into_main_grad(value, main_grad, inv_scale, found_inf, accumulate)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "linear": linear,
    "linear_dz": linear_dz,
    "linear_dx": linear_dx,
    "linear_dw": linear_dw,
    "linear_db": linear_db,
    "linear_dw_": linear_dw_,
    "linear_db_": linear_db_,
    "unscale_": unscale_,
}
