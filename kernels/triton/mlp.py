"""The gradient inside an MLP without a gate: dz = (dy @ w_out) * act'(z), in the epilogue of that product.

The same epilogue makes h = act(z) again, which was not kept, and the sums over rows of dz, the first bias's gradient:
each tile stores its own, in fp32, and a second kernel adds them up in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spu.kernels import library
from spu.kernels.arith import activate, backprop, narrow, widen
from spu.kernels.config import Config
from spu.kernels.finish import SIZE, column_sums, finish
from spu.kernels.gated import aligned, launch, plan_of
from spu.kernels.kept import Launcher
from spu.kernels.launch import POINTWISE, ceil_div, check_activation, check_operands, rows_of
from spu.kernels.tiles import add_described, add_product, describe, halves, is_wide, start_of, tile_at


@triton.jit
def _write_dz(
    acc, m, first_col, saved, dz, h, sums, M, N,
    ACTIVATION: tl.constexpr, NEEDS_H: tl.constexpr, NEEDS_SUMS: tl.constexpr, BM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write dz of the tile acc of dh, and h and the tile's sums [tiles of rows, N] if needed; a wide one in halves."""
    if is_wide(COLUMNS):
        left, right = halves(acc, BM, COLUMNS)
        _write_dz(
            left, m, first_col, saved, dz, h, sums, M, N, ACTIVATION, NEEDS_H, NEEDS_SUMS, BM, COLUMNS // 2
        )  # fmt: skip
        _write_dz(
            right, m, first_col + COLUMNS // 2, saved, dz, h, sums, M, N, ACTIVATION, NEEDS_H, NEEDS_SUMS, BM,
            COLUMNS // 2,
        )  # fmt: skip
    else:
        rows, cols = m * BM + tl.arange(0, BM), first_col + tl.arange(0, COLUMNS)
        at = rows[:, None].to(tl.int64) * N + cols[None, :]
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        z = widen(tl.load(saved + at, mask=inside, other=0.0))
        value = narrow(backprop(acc, z, ACTIVATION), dz.dtype.element_ty)
        tl.store(dz + at, value, mask=inside)
        if NEEDS_H:
            tl.store(h + at, narrow(activate(z, ACTIVATION), h.dtype.element_ty), mask=inside)
        if NEEDS_SUMS:  # rows beyond the last are zero: acc and z are
            tl.store(sums + m.to(tl.int64) * N + cols, tl.sum(widen(value), 0), mask=cols < N)


@triton.jit
def mlp_dz_kernel(
    dy, w_out, saved, dz, h, sums, M, N, K, stride_dm, stride_dk, stride_wk, stride_wn,
    ACTIVATION: tl.constexpr, NEEDS_H: tl.constexpr, NEEDS_SUMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute dz and h [M, N] and sums [tiles of rows, N] fp32 from dy [M, K] @ w_out [K, N], which is not stored."""
    m, n = tile_at(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    acc = add_product(
        tl.zeros((BM, BN), tl.float32),
        start_of(dy, m * BM, stride_dm), stride_dm, stride_dk, M - m * BM,
        start_of(w_out, n * BN, stride_wn), stride_wk, stride_wn, N - n * BN,
        0, K, dy, dy, 0, "none", BM, BN, BK, EVEN_K, WIDE,
    )  # fmt: skip
    _write_dz(acc, m, n * BN, saved, dz, h, sums, M, N, ACTIVATION, NEEDS_H, NEEDS_SUMS, BM, BN)


@triton.jit
def mlp_dz_descriptor_kernel(
    dy, w_out, saved, dz, h, sums, M, N, K, stride_dm, stride_dk, stride_wk, stride_wn,
    ACTIVATION: tl.constexpr, NEEDS_H: tl.constexpr, NEEDS_SUMS: tl.constexpr,
    D_BY_ROWS: tl.constexpr, W_BY_ROWS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Compute mlp_dz_kernel's results, persistent, with tensor descriptors."""
    from_d = describe(dy, M, K, stride_dm, stride_dk, D_BY_ROWS, BM, BK)
    from_w = describe(w_out, K, N, stride_wk, stride_wn, W_BY_ROWS, BK, BN)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for index in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = tile_at(index, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BM, BN), tl.float32)
        acc = add_described(acc, from_d, from_w, m * BM, n * BN, K, D_BY_ROWS, W_BY_ROWS, BK)
        _write_dz(acc, m, n * BN, saved, dz, h, sums, M, N, ACTIVATION, NEEDS_H, NEEDS_SUMS, BM, BN)


@triton.jit
def mlp_finish_kernel(
    dh, saved, dz, h, numel,
    ACTIVATION: tl.constexpr, DERIVATIVE: tl.constexpr, NEEDS_H: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Compute dz = dh * act'(saved) with DERIVATIVE, and h = act(saved) with NEEDS_H, each rounded once."""
    offsets = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = offsets < numel
    z = widen(tl.load(saved + offsets, mask=inside, other=0.0))
    if DERIVATIVE:
        value = backprop(widen(tl.load(dh + offsets, mask=inside, other=0.0)), z, ACTIVATION)
        tl.store(dz + offsets, narrow(value, dz.dtype.element_ty), mask=inside)
    if NEEDS_H:
        tl.store(h + offsets, narrow(activate(z, ACTIVATION), h.dtype.element_ty), mask=inside)


_KERNELS = (Launcher(mlp_dz_kernel, {}), Launcher(mlp_dz_descriptor_kernel, {}))
_FINISH = Launcher(mlp_finish_kernel, POINTWISE)


def mlp_dz(
    dy: Tensor,
    w_out: Tensor,
    saved: Tensor,
    activation: str,
    needs_h: bool,
    needs_sums: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dz = (dy @ w_out) * act'(saved), rounded once; dh = dy @ w_out is neither stored nor rounded.

    Args:
        dy: [..., M] of any strides, the scaled gradient of the MLP's result; fp16, bf16 or fp32.
        w_out: [M, N] of any strides, dy's dtype.
        saved: [..., N], the pre-activation; for relu, its result.
        activation: one of none, relu, gelu, gelu_tanh, silu.
        needs_h: also return act(saved).
        needs_sums: also return the sum over rows of the rounded dz, in fp32.
        config: instead of the table's. "cublaslt": the product with the derivative of the gelu of the form with tanh in
            its epilogue, other activations after it, as with "torch", which rounds dh.

    Returns:
        (dz [..., N], h [..., N], sums fp32 [N]), contiguous; h and sums are empty [0] where not needed.

    Raises:
        ValueError, TypeError: unknown activation; shapes, dtypes or devices that do not fit.
    """
    check_activation(activation)
    check_operands("dy, w_out and saved", dy, w_out, saved)
    fits = w_out.dim() == 2 and dy.dim() > 0 and dy.shape[-1] == w_out.shape[0]
    if not fits or saved.shape != (*dy.shape[:-1], w_out.shape[1]):
        raise ValueError(
            f"dy {tuple(dy.shape)}, w_out {tuple(w_out.shape)} and saved {tuple(saved.shape)} do not fit: need "
            "[..., M], [M, N] and [..., N]"
        )
    rows, n, saved = rows_of(dy), w_out.shape[1], saved.contiguous()
    m, k = rows.shape
    dz = torch.empty_like(saved)
    h = torch.empty_like(saved) if needs_h else saved.new_empty(0)
    sums = torch.empty(n if needs_sums else 0, dtype=torch.float32, device=dy.device)
    if dz.numel() == 0:
        return dz, h, sums.zero_()
    strides = (*rows.stride(), *w_out.stride())
    plan = plan_of("mlp_dz", dy.dtype, dy.device, (m, n, k), strides, aligned(rows, w_out), config)
    if plan.kind in ("torch", "cublaslt"):
        _by_library(plan.kind == "cublaslt", rows, w_out, saved, dz, h, activation)
        if needs_sums:
            parts, count = column_sums(dz.view(m, n))
            finish(parts, sums, count=count)
        return dz, h, sums
    tiles = ceil_div(m, plan.constants["BM"])
    parts = torch.empty(tiles, n, dtype=torch.float32, device=dy.device) if needs_sums else sums
    fixed = (m, n, k, *strides, activation, needs_h, needs_sums)
    launch(_KERNELS, plan, (rows, w_out, saved, dz, h if needs_h else dz, parts), fixed)
    if needs_sums:
        finish(parts, sums, count=tiles)
    return dz, h, sums


def _by_library(
    described: bool, rows: Tensor, w_out: Tensor, saved: Tensor, dz: Tensor, h: Tensor, activation: str
) -> None:
    """Multiply by cuBLASLt (``described``) or torch, and do in one pass what is left of the epilogue."""
    described = described and library.serves(dz.dtype, dz.device)
    if described and activation == "gelu_tanh" and library.derivative(rows, w_out, dz, saved, activation):
        left = False
    else:
        left = True
        if not (described and library.product(rows, w_out, dz)):
            with torch.no_grad(), torch.autocast(dz.device.type, enabled=False):
                torch.mm(rows, w_out, out=dz.view(rows.shape[0], w_out.shape[1]))
    needs_h = h.numel() > 0
    if left or needs_h:
        fixed = (dz.numel(), activation, left, needs_h, SIZE)
        _FINISH((ceil_div(dz.numel(), SIZE),), (dz, saved, dz, h if needs_h else dz), fixed)
