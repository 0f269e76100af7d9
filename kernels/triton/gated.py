"""The gated half of an MLP (SwiGLU and its family, arXiv:2002.05202): h = act(x @ w_gate.T) * (x @ w_up.T).

The forward makes both products in one kernel that reads x once. Its backward recomputes h instead of keeping it, in
the epilogue of the product that makes dh (which is never stored), and adds both input gradients in one accumulator.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spu.kernels.arith import activate, backprop, dot, narrow, widen
from spu.kernels.config import Config
from spu.kernels.finish import SIZE
from spu.kernels.launch import (
    POINTWISE,
    ceil_div,
    check_activation,
    check_operands,
    config_for,
    for_alignment,
    options,
    rows_of,
)
from spu.kernels.table import follows_tables
from spu.kernels.tiles import add_product, start_of, tile_at

_INT32 = 2**31 - 1
_EPILOGUE_COLUMNS = tl.constexpr(64)


@triton.jit
def gated_linear_kernel(
    x, w_gate, w_up, h, gate, up, M, N, K, stride_xm, stride_xk, stride_gn, stride_gk, stride_un, stride_uk,
    ACTIVATION: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """Compute h [M, N] from x [M, K] and w_gate, w_up [N, K] with fp32 accumulators; with KEEP also gate and up: each
    rounded once.
    """
    m, n = tile_at(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    r, c, inner = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    wide = inner.to(tl.int64)
    from_x = start_of(x, m * BM, stride_xm) + r[:, None].to(tl.int64) * stride_xm + wide[None, :] * stride_xk
    from_g = start_of(w_gate, n * BN, stride_gn) + c[None, :].to(tl.int64) * stride_gn + wide[:, None] * stride_gk
    from_u = start_of(w_up, n * BN, stride_un) + c[None, :].to(tl.int64) * stride_un + wide[:, None] * stride_uk
    in_rows, in_cols = (m * BM + r < M)[:, None], (n * BN + c < N)[None, :]
    acc_gate, acc_up = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        left = tl.load(from_x, mask=in_rows & (inner < K - k)[None, :], other=0.0)
        in_w = in_cols & (inner < K - k)[:, None]
        acc_gate = dot(left, tl.load(from_g, mask=in_w, other=0.0), acc_gate)
        acc_up = dot(left, tl.load(from_u, mask=in_w, other=0.0), acc_up)
        from_x += tl.cast(stride_xk, tl.int64) * BK
        from_g += tl.cast(stride_gk, tl.int64) * BK
        from_u += tl.cast(stride_uk, tl.int64) * BK
    offsets = (m * BM + r)[:, None].to(tl.int64) * N + (n * BN + c)[None, :]
    inside = in_rows & in_cols
    tl.store(h + offsets, narrow(activate(acc_gate, ACTIVATION) * acc_up, h.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(gate + offsets, narrow(acc_gate, gate.dtype.element_ty), mask=inside)
        tl.store(up + offsets, narrow(acc_up, up.dtype.element_ty), mask=inside)


@triton.jit
def gated_dz_kernel(
    dh, gate, up, dgate, dup, h, numel, ACTIVATION: tl.constexpr, GRADIENTS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Compute h = act(gate) * up; with GRADIENTS dgate = dh * up * act'(gate), dup = dh * act(gate). fp32, rounded
    once.
    """
    offsets = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = offsets < numel
    g = widen(tl.load(gate + offsets, mask=inside, other=0.0))
    u = widen(tl.load(up + offsets, mask=inside, other=0.0))
    act = activate(g, ACTIVATION)
    tl.store(h + offsets, narrow(act * u, h.dtype.element_ty), mask=inside)
    if GRADIENTS:
        d = widen(tl.load(dh + offsets, mask=inside, other=0.0))
        tl.store(dgate + offsets, narrow(backprop(d * u, g, ACTIVATION), dgate.dtype.element_ty), mask=inside)
        tl.store(dup + offsets, narrow(d * act, dup.dtype.element_ty), mask=inside)


@triton.jit
def _write_gated_dh(
    acc, m, first_col, gate, up, dgate, dup, h, M, N,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write dgate, dup and h of the tile acc of dh; a wide one in halves, whose results fit the registers."""
    if COLUMNS > _EPILOGUE_COLUMNS:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, COLUMNS // 2)), (0, 2, 1)))
        _write_gated_dh(left, m, first_col, gate, up, dgate, dup, h, M, N, ACTIVATION, BM, COLUMNS // 2)
        _write_gated_dh(
            right, m, first_col + COLUMNS // 2, gate, up, dgate, dup, h, M, N, ACTIVATION, BM, COLUMNS // 2
        )  # fmt: skip
    else:
        rows, cols = m * BM + tl.arange(0, BM), first_col + tl.arange(0, COLUMNS)
        at = rows[:, None].to(tl.int64) * N + cols[None, :]
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        g = widen(tl.load(gate + at, mask=inside, other=0.0))
        u = widen(tl.load(up + at, mask=inside, other=0.0))
        act = activate(g, ACTIVATION)
        tl.store(h + at, narrow(act * u, h.dtype.element_ty), mask=inside)
        tl.store(dup + at, narrow(acc * act, dup.dtype.element_ty), mask=inside)
        tl.store(dgate + at, narrow(backprop(acc * u, g, ACTIVATION), dgate.dtype.element_ty), mask=inside)


@triton.jit
def gated_dh_kernel(
    dy, w_down, gate, up, dgate, dup, h, M, N, K, stride_dm, stride_dk, stride_wk, stride_wn,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute gated_dz_kernel's results from dh = dy [M, K] @ w_down [K, N], which stays in fp32 and in registers."""
    m, n = tile_at(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    acc = add_product(
        tl.zeros((BM, BN), tl.float32),
        start_of(dy, m * BM, stride_dm), stride_dm, stride_dk, M - m * BM,
        start_of(w_down, n * BN, stride_wn), stride_wk, stride_wn, N - n * BN,
        0, K, dy, dy, 0, "none", BM, BN, BK, EVEN_K, WIDE,
    )  # fmt: skip
    _write_gated_dh(acc, m, n * BN, gate, up, dgate, dup, h, M, N, ACTIVATION, BM, BN)


@triton.jit
def gated_dx_kernel(
    dgate, dup, w_gate, w_up, dx, M, N, K, stride_gm, stride_gk, stride_um, stride_uk,
    stride_wk, stride_wn, stride_vk, stride_vn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute dx [M, N] = dgate [M, K] @ w_gate [K, N] + dup [M, K] @ w_up [K, N], in one accumulator."""
    m, n = tile_at(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    acc = add_product(
        tl.zeros((BM, BN), tl.float32),
        start_of(dgate, m * BM, stride_gm), stride_gm, stride_gk, M - m * BM,
        start_of(w_gate, n * BN, stride_wn), stride_wk, stride_wn, N - n * BN,
        0, K, dgate, dgate, 0, "none", BM, BN, BK, EVEN_K, WIDE,
    )  # fmt: skip
    acc = add_product(
        acc,
        start_of(dup, m * BM, stride_um), stride_um, stride_uk, M - m * BM,
        start_of(w_up, n * BN, stride_vn), stride_vk, stride_vn, N - n * BN,
        0, K, dup, dup, 0, "none", BM, BN, BK, EVEN_K, WIDE,
    )  # fmt: skip
    rows, cols = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    at = rows[:, None].to(tl.int64) * N + cols[None, :]
    tl.store(dx + at, narrow(acc, dx.dtype.element_ty), mask=inside)


@follows_tables
@lru_cache(maxsize=4096)
def _plan(
    op: str,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, int, int],
    strides: tuple[int, ...],
    override: Config | None,
) -> tuple[bool, tuple[int], dict[str, Any]]:
    """Return (whether torch makes the products, grid, constants)."""
    config = override or for_alignment(config_for(op, dtype, device, shape), dtype, (*strides, shape[1]))
    m, n, _ = shape
    constants = {"BM": config.block_m, "BN": config.block_n, "BK": config.block_k, "GROUP_M": config.group_m}
    grid = (ceil_div(m, config.block_m) * ceil_div(n, config.block_n),)
    return config.kind == "torch", grid, constants | options(config, dtype)


def _check_weights(w_gate: Tensor, w_up: Tensor) -> None:
    if w_gate.dim() != 2 or w_gate.shape != w_up.shape:
        raise ValueError(
            f"w_gate {tuple(w_gate.shape)} and w_up {tuple(w_up.shape)} must both be [N, K] of the same N and K"
        )


def gated_linear(
    x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str, keep: bool = True, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute h = act(gate) * up, gate = x @ w_gate.T, up = x @ w_up.T, accumulated in fp32; each rounded once.

    Args:
        x: [..., K]; fp16, bf16 or fp32, any strides.
        w_gate, w_up: [N, K], x's dtype, any strides.
        activation: one of none, relu, gelu, gelu_tanh, silu.
        keep: also store gate and up, for the backward.
        config: instead of the table's.

    Returns:
        (h, gate, up), each [..., N], contiguous; gate and up empty [0] unless kept.

    Raises:
        ValueError, TypeError: unknown activation; shapes, dtypes or devices that do not fit.
    """
    check_activation(activation)
    check_operands("x, w_gate and w_up", x, w_gate, w_up)
    _check_weights(w_gate, w_up)
    if x.dim() == 0 or x.shape[-1] != w_gate.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and w_gate {tuple(w_gate.shape)} do not fit: need [..., K] and [N, K]")
    rows, n = rows_of(x), w_gate.shape[0]
    m, k = rows.shape
    h = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    gate, up = (torch.empty_like(h) if keep else h.new_empty(0) for _ in range(2))
    if h.numel() == 0:
        return h, gate, up
    strides = (*rows.stride(), *w_gate.stride(), *w_up.stride())
    by_torch, grid, constants = _plan("gated_linear", x.dtype, x.device, (m, n, k), strides, config)
    if by_torch:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            made = torch.mm(rows, w_gate.t()).view(h.shape), torch.mm(rows, w_up.t()).view(h.shape)
        grid = (ceil_div(h.numel(), SIZE),)  # h of the rounded products
        gated_dz_kernel[grid](h, *made, h, h, h, h.numel(), activation, False, SIZE, **POINTWISE)
        return (h, *made) if keep else (h, gate, up)
    gated_linear_kernel[grid](
        rows, w_gate, w_up, h, gate, up, m, n, k, *strides, activation, keep, **constants,
    )  # fmt: skip
    return h, gate, up


def gated_dz(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dgate, dup, h) from the scaled dh and the saved gate and up, all of one shape and dtype.

    dgate = dh * up * act'(gate), dup = dh * act(gate), h = act(gate) * up: in fp32, each rounded once.
    """
    check_activation(activation)
    check_operands("dh, gate and up", dh, gate, up)
    if dh.shape != gate.shape or gate.shape != up.shape:
        raise ValueError(f"dh {tuple(dh.shape)}, gate {tuple(gate.shape)} and up {tuple(up.shape)} differ in shape")
    dh, gate, up = dh.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup, h = torch.empty_like(dh), torch.empty_like(dh), torch.empty_like(dh)
    if dh.numel():
        grid = (ceil_div(dh.numel(), SIZE),)
        gated_dz_kernel[grid](dh, gate, up, dgate, dup, h, dh.numel(), activation, True, SIZE, **POINTWISE)
    return dgate, dup, h


def gated_dh(
    dy: Tensor, w_down: Tensor, gate: Tensor, up: Tensor, activation: str, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``gated_dz`` of dh = dy @ w_down, in the epilogue of that product: dh is neither stored nor rounded.

    Args:
        dy: [..., M], the scaled gradient of the block's result.
        w_down: [M, N], dy's dtype.
        gate, up: [..., N], saved by the forward.
        activation: as in ``gated_linear``.
        config: instead of the table's.

    Returns:
        (dgate, dup, h), each [..., N], contiguous.
    """
    check_activation(activation)
    check_operands("dy, w_down, gate and up", dy, w_down, gate, up)
    fits = w_down.dim() == 2 and dy.shape[-1] == w_down.shape[0] and gate.shape == up.shape
    if not fits or gate.shape != (*dy.shape[:-1], w_down.shape[1]):
        raise ValueError(
            f"dy {tuple(dy.shape)}, w_down {tuple(w_down.shape)}, gate {tuple(gate.shape)} and up {tuple(up.shape)} do "
            "not fit: need [..., M], [M, N], [..., N] and [..., N]"
        )
    rows, n = rows_of(dy), w_down.shape[1]
    m, k = rows.shape
    strides = (*rows.stride(), *w_down.stride())
    by_torch, grid, constants = _plan("gated_dh", dy.dtype, dy.device, (m, n, k), strides, config)
    if by_torch:
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            dh = torch.mm(rows, w_down).view(gate.shape)
        return gated_dz(dh, gate, up, activation)
    gate, up = gate.contiguous(), up.contiguous()
    dgate, dup, h = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    if h.numel():
        gated_dh_kernel[grid](
            rows, w_down, gate, up, dgate, dup, h, m, n, k, *strides, activation, **constants,
            EVEN_K=k % constants["BK"] == 0, WIDE=_wide(constants, strides),
        )  # fmt: skip
    return dgate, dup, h


def _wide(constants: dict[str, Any], strides: tuple[int, ...]) -> bool:
    """Tell whether offsets within a tile leave 32 bits."""
    return 2 * max(constants["BM"], constants["BN"], constants["BK"]) * (max(map(abs, strides)) + 1) > _INT32


def gated_dx(dgate: Tensor, dup: Tensor, w_gate: Tensor, w_up: Tensor, config: Config | None = None) -> Tensor:
    """Compute dx = dgate @ w_gate + dup @ w_up in one fp32 accumulation, rounded once.

    Args:
        dgate, dup: [..., N], still scaled.
        w_gate, w_up: [N, K].

    Returns:
        [..., K], contiguous.
    """
    check_operands("dgate, dup, w_gate and w_up", dgate, dup, w_gate, w_up)
    _check_weights(w_gate, w_up)
    if dgate.shape != dup.shape or dgate.shape[-1] != w_gate.shape[0]:
        raise ValueError(
            f"dgate {tuple(dgate.shape)}, dup {tuple(dup.shape)} and w_gate {tuple(w_gate.shape)} do not fit: need "
            "[..., N], [..., N] and [N, K]"
        )
    first, second = rows_of(dgate), rows_of(dup)
    (m, k), n = first.shape, w_gate.shape[1]
    dx = torch.empty((*dgate.shape[:-1], n), dtype=dgate.dtype, device=dgate.device)
    if dx.numel() == 0:
        return dx
    strides = (*first.stride(), *second.stride(), *w_gate.stride(), *w_up.stride())
    by_torch, grid, constants = _plan("gated_dx", dgate.dtype, dgate.device, (m, n, k), strides, config)
    if by_torch:
        with torch.no_grad(), torch.autocast(dx.device.type, enabled=False):
            torch.mm(torch.cat((first, second), 1), torch.cat((w_gate, w_up), 0), out=dx.view(m, n))
        return dx
    gated_dx_kernel[grid](
        first, second, w_gate, w_up, dx, m, n, k, *strides,
        EVEN_K=k % constants["BK"] == 0, WIDE=_wide(constants, strides), **constants,
    )  # fmt: skip
    return dx
