"""A linear layer's forward with its epilogue, and its weight gradient that knows the loss scale."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arith import activate, dot, narrow, nonfinite, widen

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
STORAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# One tile for all shapes so far; it fits the shared memory of every architecture from sm_80 on, also in fp32.
BLOCK_ROWS, BLOCK_COLS, BLOCK_INNER = 64, 64, 32
LAUNCH = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}  # contraction pinned: 3.10 changes the default


@triton.jit
def _linear_fwd_kernel(
    x, weight, bias, y, preact, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP_PREACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # x [M, K], weight [N, K], bias [N], y and preact [M, N] contiguous
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + inner
        a = tl.load(
            x + rows[:, None] * stride_xm + k[None, :] * stride_xk,
            mask=(rows[:, None] < M) & (k[None, :] < K),
            other=0.0,
        )  # [BM, BK]
        b = tl.load(
            weight + k[:, None] * stride_wk + cols[None, :] * stride_wn,
            mask=(k[:, None] < K) & (cols[None, :] < N),
            other=0.0,
        )  # [BK, BN]
        acc = dot(a, b, acc)
    if HAS_BIAS:
        acc += widen(tl.load(bias + cols, mask=cols < N, other=0.0))[None, :]
    out = rows[:, None] * N + cols[None, :]
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    if KEEP_PREACT:
        tl.store(preact + out, narrow(acc, preact.dtype.element_ty), mask=inside)
    tl.store(y + out, narrow(activate(acc, ACTIVATION), y.dtype.element_ty), mask=inside)


@triton.jit
def _linear_dw_kernel(
    dz, x, main_grad, inv_scale, found_inf, M, N, K, stride_dm, stride_dn, stride_xm, stride_xk,
    ACCUMULATE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    # dz [M, N], x [M, K], main_grad [N, K] contiguous fp32
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.program_id(1).to(tl.int64) * BK + tl.arange(0, BK)
    steps = tl.arange(0, BM)
    acc = tl.zeros((BN, BK), tl.float32)
    for start in range(0, M, BM):
        m = (start + steps).to(tl.int64)
        a = tl.load(
            dz + n[:, None] * stride_dn + m[None, :] * stride_dm, mask=(n[:, None] < N) & (m[None, :] < M), other=0.0
        )  # [BN, BM]
        b = tl.load(
            x + m[:, None] * stride_xm + k[None, :] * stride_xk, mask=(m[:, None] < M) & (k[None, :] < K), other=0.0
        )  # [BM, BK]
        acc = dot(a, b, acc)
    target = main_grad + n[:, None] * K + k[None, :]
    inside = (n[:, None] < N) & (k[None, :] < K)
    value = acc * tl.load(inv_scale)
    if ACCUMULATE:  # else a store without a load: 0 * inf of a stale buffer would be NaN
        value += tl.load(target, mask=inside, other=0.0)
    tl.store(target, value, mask=inside)
    overflow = tl.max(nonfinite(acc).to(tl.int32)) > 0
    tl.store(found_inf, 1.0, mask=overflow)  # only ever set, so concurrent programs agree


def _rows(x: Tensor) -> Tensor:
    """[..., K] -> [rows, K]; also for K = 0, where reshape(-1, 0) is ambiguous."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _check_operands(names: str, *tensors: Tensor) -> None:
    first = tensors[0]
    if first.dtype not in STORAGE_DTYPES:
        raise TypeError(f"{names}: dtype {first.dtype} is not supported: use float16, bfloat16 or float32")
    for other in tensors[1:]:
        if other.dtype != first.dtype or other.device != first.device:
            raise ValueError(
                f"{names} must share dtype and device, but are "
                + ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
                + ": convert them with .to() first"
            )


def linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", keep_preact: bool = False
) -> tuple[Tensor, Tensor]:
    """y = act(z), z = x @ weight.T + bias, accumulated in fp32; y and z are each rounded once.

    Args:
        x: [..., K] of any strides; fp16, bf16 or fp32.
        weight: [N, K] of any strides, x's dtype.
        bias: [N] or None.
        activation: one of none, relu, gelu, gelu_tanh, silu.
        keep_preact: also store z.

    Returns:
        (y [..., N], z [..., N] if kept, else empty [0]), contiguous, in x's dtype.

    Raises:
        ValueError: unknown activation, shapes that do not fit, mixed dtypes or devices.
        TypeError: another dtype.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: use one of {', '.join(ACTIVATIONS)}")
    _check_operands("x, weight and bias", *([x, weight] if bias is None else [x, weight, bias]))
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit: need [..., K] and [N, K]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}: need [{weight.shape[0]}]"
        )
    rows = _rows(x)
    (m, k), n = rows.shape, weight.shape[0]
    y = x.new_empty(*x.shape[:-1], n)
    preact = torch.empty_like(y) if keep_preact else x.new_empty(0)
    if y.numel():
        grid = (triton.cdiv(m, BLOCK_ROWS), triton.cdiv(n, BLOCK_COLS))
        _linear_fwd_kernel[grid](
            rows, weight, weight if bias is None else bias.contiguous(), y, preact if keep_preact else y,
            m, n, k, *rows.stride(), *weight.stride(), activation, bias is not None, keep_preact,
            BLOCK_ROWS, BLOCK_COLS, BLOCK_INNER, **LAUNCH,
        )  # fmt: skip
    return y, preact


def linear_dw_(
    dz: Tensor, x: Tensor, main_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, accumulate: bool
) -> None:
    """main_grad (+)= inv_scale * dz.T @ x in fp32, never rounded to 16 bits.

    Args:
        dz: [..., N], the scaled gradient of the pre-activation; fp16, bf16 or fp32.
        x: [..., K], the layer's input, dz's dtype and leading dimensions.
        main_grad: [N, K] contiguous fp32. Its old content is not read unless ``accumulate``.
        inv_scale: fp32 [1], on the device: 1 / loss scale.
        found_inf: fp32 [1], set to 1 if any accumulator is infinite or NaN, and never reset.
        accumulate: add to main_grad instead of storing.

    Raises:
        ValueError: shapes that do not fit, mixed dtypes or devices, a main_grad that is not contiguous.
        TypeError: another dtype.
    """
    _check_operands("dz and x", dz, x)
    _check_operands("main_grad, inv_scale and found_inf", main_grad, inv_scale, found_inf)
    rows, inputs = _rows(dz), _rows(x)
    (m, n), k = rows.shape, inputs.shape[1]
    if inputs.shape[0] != m or main_grad.shape != (n, k):
        raise ValueError(
            f"dz {tuple(dz.shape)}, x {tuple(x.shape)} and main_grad {tuple(main_grad.shape)} do not fit: "
            "need [..., N], [..., K] and [N, K]"
        )
    if main_grad.dtype != torch.float32 or not main_grad.is_contiguous() or main_grad.device != dz.device:
        raise ValueError(
            f"main_grad must be a contiguous float32 tensor on {dz.device}, not {main_grad.dtype} "
            f"with strides {main_grad.stride()} on {main_grad.device}"
        )
    if main_grad.numel():
        grid = (triton.cdiv(n, BLOCK_COLS), triton.cdiv(k, BLOCK_ROWS))
        _linear_dw_kernel[grid](
            rows, inputs, main_grad, inv_scale, found_inf, m, n, k, *rows.stride(), *inputs.stride(),
            accumulate, BLOCK_COLS, BLOCK_ROWS, BLOCK_INNER, **LAUNCH,
        )  # fmt: skip
