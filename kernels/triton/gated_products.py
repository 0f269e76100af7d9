"""Kernels of the gated half of an MLP: its products with their epilogues. ``gated.py`` launches them.

Each product comes in two forms: one program a tile, with loads by address, and persistent with tensor descriptors
(TMA, sm_90 and later), whose loads need no registers, so that tiles may be larger.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spu.kernels.arith import activate, backprop, dot, narrow, widen
from spu.kernels.tiles import add_described, add_product, describe, described_tile, halves, is_wide, start_of, tile_at


@triton.jit
def _write_gated(
    acc_gate, acc_up, m, first_col, h, gate, up, M, N,
    ACTIVATION: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write h, and with KEEP gate and up, of the tiles of gate and up; wide ones in halves."""
    if is_wide(COLUMNS):
        gate_left, gate_right = halves(acc_gate, BM, COLUMNS)
        up_left, up_right = halves(acc_up, BM, COLUMNS)
        _write_gated(gate_left, up_left, m, first_col, h, gate, up, M, N, ACTIVATION, KEEP, BM, COLUMNS // 2)
        _write_gated(
            gate_right, up_right, m, first_col + COLUMNS // 2, h, gate, up, M, N, ACTIVATION, KEEP, BM, COLUMNS // 2
        )  # fmt: skip
    else:
        rows, cols = m * BM + tl.arange(0, BM), first_col + tl.arange(0, COLUMNS)
        at = rows[:, None].to(tl.int64) * N + cols[None, :]
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(h + at, narrow(activate(acc_gate, ACTIVATION) * acc_up, h.dtype.element_ty), mask=inside)
        if KEEP:
            tl.store(gate + at, narrow(acc_gate, gate.dtype.element_ty), mask=inside)
            tl.store(up + at, narrow(acc_up, up.dtype.element_ty), mask=inside)


@triton.jit
def gated_linear_kernel(
    x, w_gate, w_up, h, gate, up, M, N, K, stride_xm, stride_xk, stride_gk, stride_gn, stride_uk, stride_un,
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
    _write_gated(acc_gate, acc_up, m, n * BN, h, gate, up, M, N, ACTIVATION, KEEP, BM, BN)


@triton.jit
def gated_linear_descriptor_kernel(
    x, w_gate, w_up, h, gate, up, M, N, K, stride_xm, stride_xk, stride_gk, stride_gn, stride_uk, stride_un,
    ACTIVATION: tl.constexpr, KEEP: tl.constexpr, X_BY_ROWS: tl.constexpr, G_BY_ROWS: tl.constexpr,
    U_BY_ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Compute gated_linear_kernel's results, persistent, with tensor descriptors; a tile of x is used twice."""
    from_x = describe(x, M, K, stride_xm, stride_xk, X_BY_ROWS, BM, BK)
    from_g = describe(w_gate, K, N, stride_gk, stride_gn, G_BY_ROWS, BK, BN)
    from_u = describe(w_up, K, N, stride_uk, stride_un, U_BY_ROWS, BK, BN)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for index in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = tile_at(index, tiles_m, tiles_n, GROUP_M)
        acc_gate, acc_up = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            left = described_tile(from_x, m * BM, k, X_BY_ROWS)
            acc_gate = dot(left, described_tile(from_g, k, n * BN, G_BY_ROWS), acc_gate)
            acc_up = dot(left, described_tile(from_u, k, n * BN, U_BY_ROWS), acc_up)
        _write_gated(acc_gate, acc_up, m, n * BN, h, gate, up, M, N, ACTIVATION, KEEP, BM, BN)


@triton.jit
def _write_gated_dh(
    acc, m, first_col, gate, up, dgate, dup, h, M, N,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write dgate, dup and h of the tile acc of dh; a wide one in halves, whose results fit the registers."""
    if is_wide(COLUMNS):
        left, right = halves(acc, BM, COLUMNS)
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


@triton.jit
def gated_dh_descriptor_kernel(
    dy, w_down, gate, up, dgate, dup, h, M, N, K, stride_dm, stride_dk, stride_wk, stride_wn,
    ACTIVATION: tl.constexpr, D_BY_ROWS: tl.constexpr, W_BY_ROWS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Compute gated_dh_kernel's results, persistent, with tensor descriptors."""
    from_d = describe(dy, M, K, stride_dm, stride_dk, D_BY_ROWS, BM, BK)
    from_w = describe(w_down, K, N, stride_wk, stride_wn, W_BY_ROWS, BK, BN)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for index in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = tile_at(index, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BM, BN), tl.float32)
        acc = add_described(acc, from_d, from_w, m * BM, n * BN, K, D_BY_ROWS, W_BY_ROWS, BK)
        _write_gated_dh(acc, m, n * BN, gate, up, dgate, dup, h, M, N, ACTIVATION, BM, BN)


@triton.jit
def _write_dx(acc, m, first_col, dx, M, N, BM: tl.constexpr, COLUMNS: tl.constexpr):
    if is_wide(COLUMNS):
        left, right = halves(acc, BM, COLUMNS)
        _write_dx(left, m, first_col, dx, M, N, BM, COLUMNS // 2)
        _write_dx(right, m, first_col + COLUMNS // 2, dx, M, N, BM, COLUMNS // 2)
    else:
        rows, cols = m * BM + tl.arange(0, BM), first_col + tl.arange(0, COLUMNS)
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        at = rows[:, None].to(tl.int64) * N + cols[None, :]
        tl.store(dx + at, narrow(acc, dx.dtype.element_ty), mask=inside)


@triton.jit
def gated_dx_descriptor_kernel(
    dgate, dup, w_gate, w_up, dx, M, N, K, stride_gm, stride_gk, stride_um, stride_uk,
    stride_wk, stride_wn, stride_vk, stride_vn,
    G_BY_ROWS: tl.constexpr, U_BY_ROWS: tl.constexpr, W_BY_ROWS: tl.constexpr, V_BY_ROWS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Compute gated_dx_kernel's result, persistent, with tensor descriptors."""
    from_g = describe(dgate, M, K, stride_gm, stride_gk, G_BY_ROWS, BM, BK)
    from_u = describe(dup, M, K, stride_um, stride_uk, U_BY_ROWS, BM, BK)
    from_w = describe(w_gate, K, N, stride_wk, stride_wn, W_BY_ROWS, BK, BN)
    from_v = describe(w_up, K, N, stride_vk, stride_vn, V_BY_ROWS, BK, BN)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for index in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = tile_at(index, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BM, BN), tl.float32)
        acc = add_described(acc, from_g, from_w, m * BM, n * BN, K, G_BY_ROWS, W_BY_ROWS, BK)
        acc = add_described(acc, from_u, from_v, m * BM, n * BN, K, U_BY_ROWS, V_BY_ROWS, BK)
        _write_dx(acc, m, n * BN, dx, M, N, BM, BN)
