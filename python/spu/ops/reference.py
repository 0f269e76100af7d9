"""The definition of every op, in plain torch, on any device.

16-bit operands are widened, computed in fp32 and rounded once. fp32 results are bit-equal to plain torch's: the
products are written as torch's own autograd writes them (``grad.mm(weight)``, ``grad.t().mm(x)``). fp64 is computed in
fp64, for gradcheck.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import wire

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
_HALVES = (torch.float16, torch.bfloat16)


def autocast_enabled(device_type: str) -> bool:
    """torch.is_autocast_enabled, which refuses to be asked about meta tensors."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps autocast out: it would narrow the fp32 products again."""

    @wraps(function)
    def run(first: Tensor, *args: Any) -> Any:
        if autocast_enabled(first.device.type):
            with torch.autocast(first.device.type, enabled=False):
                return function(first, *args)
        return function(first, *args)

    return run


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALVES else x


def _rows(x: Tensor) -> Tensor:
    """[..., C] -> [rows, C]."""
    return x.reshape(wire.numel_of(x.shape[:-1]), x.shape[-1])


def activate(z: Tensor, activation: str) -> Tensor:
    """act(z); "gelu" is exact (erf), "gelu_tanh" its tanh approximation. "none" returns z itself."""
    if activation == "none":
        return z
    if activation == "relu":
        return F.relu(z)
    if activation == "silu":
        return F.silu(z)
    assert activation in ("gelu", "gelu_tanh"), activation
    return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


@_exact
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep_preact: bool) -> tuple[Tensor, Tensor]:
    """y = act(x @ weight.T + bias), and z in the storage dtype if ``keep_preact``, else an empty tensor."""
    z = F.linear(_wide(x), _wide(weight), None if bias is None else _wide(bias))
    y = activate(z, activation).to(x.dtype).contiguous()
    if not keep_preact:
        return y, x.new_empty(0)
    preact = z.to(x.dtype).contiguous()
    return y, preact.clone() if preact is y else preact  # outputs of an op must not alias


@_exact
def linear_dz(dy: Tensor, saved: Tensor, activation: str) -> Tensor:
    """dz = dy * act'(saved), rounded once. ``saved`` is z, except for relu: y."""
    wide_dy, wide_saved = _wide(dy), _wide(saved)
    if activation == "relu":
        dz = torch.ops.aten.threshold_backward(wide_dy, wide_saved, 0)
    elif activation == "silu":
        dz = torch.ops.aten.silu_backward(wide_dy, wide_saved)
    else:
        assert activation in ("gelu", "gelu_tanh"), activation
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        dz = torch.ops.aten.gelu_backward(wide_dy, wide_saved, approximate=approximate)
    return dz.to(dy.dtype).contiguous()


@_exact
def linear_dx(dz: Tensor, weight: Tensor) -> Tensor:
    """dx = dz @ weight. dz [..., N], weight [N, K] -> [..., K]."""
    dx = _rows(_wide(dz)).mm(_wide(weight))
    return dx.to(dz.dtype).view(*dz.shape[:-1], weight.shape[1])


@_exact
def linear_dw(dz: Tensor, x: Tensor) -> Tensor:
    """dw = dz.T @ x over all rows. dz [..., N], x [..., K] -> [N, K]."""
    return _rows(_wide(dz)).t().mm(_rows(_wide(x))).to(dz.dtype)


def linear_db(dz: Tensor) -> Tensor:
    """db = sum over rows of dz. [..., N] -> [N]."""
    return _rows(_wide(dz)).sum(0).to(dz.dtype)


def _into_main_grad(value: Tensor, main_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, accumulate: bool) -> None:
    """main_grad (+)= inv_scale * value, and found_inf = 1 if any of value is not finite. Consumes fp32 ``value``."""
    value = value.contiguous()
    if value.numel():
        # The op that GradScaler uses: one pass that multiplies and checks.
        torch._amp_foreach_non_finite_check_and_unscale_([value], found_inf, inv_scale)
    if accumulate:
        main_grad.add_(value)
    else:
        main_grad.copy_(value)


@_exact
def linear_dw_(
    dz: Tensor, x: Tensor, main_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, accumulate: bool
) -> None:
    """main_grad (+)= inv_scale * dz.T @ x, in fp32, never rounded to 16 bits."""
    product = _rows(dz.float()).t().mm(_rows(x.float()))
    _into_main_grad(product, main_grad, inv_scale, found_inf, accumulate)


def linear_db_(dz: Tensor, main_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, accumulate: bool) -> None:
    """main_grad (+)= inv_scale * sum over rows of dz, in fp32."""
    _into_main_grad(_rows(dz.float()).sum(0), main_grad, inv_scale, found_inf, accumulate)


def unscale_(grad: Tensor, main_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, accumulate: bool) -> None:
    """main_grad (+)= inv_scale * grad, in fp32."""
    value = grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    _into_main_grad(value, main_grad, inv_scale, found_inf, accumulate)


def _scales_of(blocks: Tensor) -> Tensor:
    """[B, block] fp32 -> [B] scales: absmax / 127; NaN for a non-finite block; 0 where that is subnormal."""
    if blocks.numel() == 0:
        return blocks.new_empty(blocks.shape[0])
    absmax = blocks.abs().amax(1)
    scales = absmax / 127
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, torch.zeros_like(scales), scales)
    return torch.where(torch.isfinite(absmax), scales, torch.full_like(scales, float("nan")))


def pack(x: Tensor, codec: str) -> Tensor:
    """x of any shape and strides -> wire, uint8 [wire_bytes]. The padding is zero."""
    found, numel = wire.codec_of(codec), x.numel()
    out = torch.zeros(wire.wire_bytes(x.shape, x.dtype, codec), dtype=torch.uint8, device=x.device)
    head = bytearray(wire.header(x.shape, x.dtype, codec))
    out[: wire.HEADER_BYTES].copy_(torch.frombuffer(head, dtype=torch.uint8))
    flat = x.reshape(-1)
    start = wire.HEADER_BYTES + wire.scales_bytes(numel, found)
    payload = out[start : start + found.item_bytes * numel]
    if codec != "int8":
        payload.view(torch.float16 if codec == "fp16" else torch.bfloat16).copy_(flat)
        return out
    count = wire.block_count(numel, found)
    blocks = F.pad(flat.float(), (0, count * found.block - numel)).view(count, found.block)
    scales = _scales_of(blocks)
    usable = torch.isfinite(scales) & (scales > 0)
    quotient = blocks / torch.where(usable, scales, torch.ones_like(scales))[:, None]
    codes = torch.where(usable[:, None], quotient.round().clamp(-127, 127), torch.zeros_like(quotient))
    payload.view(torch.int8).copy_(codes.reshape(-1)[:numel])
    out[wire.HEADER_BYTES : wire.HEADER_BYTES + 4 * count].view(torch.float32).copy_(scales)
    return out


def unpack(buffer: Tensor, shape: Sequence[int], dtype: torch.dtype, codec: str) -> Tensor:
    """wire -> tensor of ``shape`` and ``dtype``; looks at no value of the header."""
    found, numel = wire.codec_of(codec), wire.numel_of(shape)
    if buffer.storage_offset() % 4 or not buffer.is_contiguous():
        buffer = buffer.clone(memory_format=torch.contiguous_format)  # views of wider types need aligned bytes
    start = wire.HEADER_BYTES + wire.scales_bytes(numel, found)
    payload = buffer[start : start + found.item_bytes * numel]
    if codec != "int8":
        stored = payload.view(torch.float16 if codec == "fp16" else torch.bfloat16)
        return stored.to(dtype, copy=True).view(tuple(shape))
    count = wire.block_count(numel, found)
    scales = buffer[wire.HEADER_BYTES : wire.HEADER_BYTES + 4 * count].view(torch.float32)
    values = payload.view(torch.int8).float()
    blocks = F.pad(values, (0, count * found.block - numel)).view(count, found.block) * scales[:, None]
    return blocks.reshape(-1)[:numel].to(dtype, copy=True).view(tuple(shape))


def adamw_(
    param: Tensor,
    grad: Tensor,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    found_inf: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW update (Loshchilov and Hutter, arXiv:1711.05101) in torch's own order of operations.

    Bit-equal in fp32 to ``torch.optim.AdamW(foreach=False, fused=False)`` on the CPU.
    """
    target = param if master is None else master
    if param.device.type == "cpu":
        if found_inf.item() != 0:
            return
        count = step.item()
        target.mul_(1 - lr * weight_decay)
        g = grad * grad_scale.squeeze()
        exp_avg.lerp_(g, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        step_size = lr / (1 - beta1**count)
        denominator = (exp_avg_sq.sqrt() / (1 - beta2**count) ** 0.5).add_(eps)
        target.addcdiv_(exp_avg, denominator, value=-step_size)
    else:
        adamw_on_device(
            target, grad, exp_avg, exp_avg_sq, step, grad_scale, found_inf, lr, beta1, beta2, eps, weight_decay
        )
    if master is not None:
        param.copy_(master)


def adamw_on_device(
    target: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    found_inf: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The same update without a host sync: the step number and found_inf are read on the device only."""
    keep = found_inf.squeeze() == 0  # zero-dimensional, like all scalars here: a parameter may be that too
    count = step.squeeze().double()
    step_size = (lr / (1 - beta1**count)).to(target.dtype)
    root_correction = (1 - beta2**count).sqrt().to(target.dtype)
    g = grad * grad_scale.squeeze()
    average = exp_avg.lerp(g, 1 - beta1)
    square = (exp_avg_sq * beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (square.sqrt() / root_correction).add_(eps)
    moved = (target * (1 - lr * weight_decay)).sub_(average.div(denominator).mul_(step_size))
    for old, new in ((exp_avg, average), (exp_avg_sq, square), (target, moved)):
        old.copy_(torch.where(keep, new, old))


def grad_sqnorm(grad: Tensor) -> Tensor:
    """Sum of squares, accumulated in fp64 -> fp32 [1]."""
    return torch.linalg.vector_norm(grad, dtype=torch.float64).square().float().reshape(1)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "linear": linear,
    "linear_dz": linear_dz,
    "linear_dx": linear_dx,
    "linear_dw": linear_dw,
    "linear_db": linear_db,
    "linear_dw_": linear_dw_,
    "linear_db_": linear_db_,
    "unscale_": unscale_,
    "pack": pack,
    "unpack": unpack,
    "adamw_": adamw_,
    "grad_sqnorm": grad_sqnorm,
}
