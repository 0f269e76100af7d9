"""Device functions of all products: the order of tiles, the loop over the inner dimension, and the epilogues."""

from __future__ import annotations

import triton
import triton.language as tl

from spu.kernels.arith import activate, backprop, dot, narrow, nonfinite, widen


@triton.constexpr_function
def is_wide(columns):
    """Tell whether an epilogue takes so many columns in halves: those of a whole tile, with an address each, do not fit
    the registers.
    """
    return columns > 32


@triton.jit
def tile_at(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return (row, column) of a tile; GROUP_M rows of tiles are walked together, so that they share columns in the
    cache.
    """
    width = GROUP_M * tiles_n
    first = index // width * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = index % width
    return first + inside % height, inside // height


@triton.jit
def start_of(pointer, index, stride):
    """Return pointer + index * stride in 64 bits."""
    return pointer + tl.cast(index, tl.int64) * stride


@triton.jit
def add_product(
    acc, a, stride_ar, stride_ak, rows_left, b, stride_bk, stride_bc, cols_left, k_first, k_last, saved, dz, column,
    DERIVATIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr = False,
):  # fmt: skip
    """Return acc + a @ b over k_first <= k < k_last; a and b point at row 0 of the tile and at k = 0.

    With DERIVATIVE, a holds dy: what is multiplied is dz = dy * act'(saved), rounded to the storage dtype as if it had
    been stored; it is stored (to ``dz``, laid out like a) by the tiles of ``column`` 0.
    """
    r, c, inner = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    if WIDE:  # strides so large that offsets within a tile leave 32 bits
        r, c, inner = r.to(tl.int64), c.to(tl.int64), inner.to(tl.int64)
    from_a = r[:, None] * stride_ar + inner[None, :] * stride_ak  # [BM, BK]
    from_b = inner[:, None] * stride_bk + c[None, :] * stride_bc  # [BK, BN]
    step_a, step_b = tl.cast(stride_ak, tl.int64) * BK, tl.cast(stride_bk, tl.int64) * BK
    moved = tl.cast(k_first, tl.int64) * stride_ak
    a += moved
    saved += moved
    dz += moved
    b += tl.cast(k_first, tl.int64) * stride_bk
    for k in range(k_first, k_last, BK):
        in_a = (r < rows_left)[:, None]
        in_b = (c < cols_left)[None, :]
        if not EVEN_K:
            in_a = in_a & (inner < k_last - k)[None, :]
            in_b = in_b & (inner < k_last - k)[:, None]
        left = tl.load(a + from_a, mask=in_a, other=0.0)
        if DERIVATIVE != "none":
            kept = tl.load(saved + from_a, mask=in_a, other=0.0)
            left = narrow(backprop(widen(left), widen(kept), DERIVATIVE), left.dtype)
            first_column = (tl.zeros((BM, BK), tl.int32) + column) == 0
            tl.store(dz + from_a, left, mask=in_a & first_column)
            saved += step_a
            dz += step_a
        right = tl.load(b + from_b, mask=in_b, other=0.0)
        acc = dot(left, right, acc, HALF)
        a += step_a
        b += step_b
    return acc


@triton.jit
def describe(
    pointer, rows, columns, stride_r, stride_c, BY_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Return a descriptor of a matrix in tiles of ROWS x COLUMNS. BY_ROWS: its second stride is 1, else its first is,
    and what is described is the transpose.
    """
    if BY_ROWS:
        return tl.make_tensor_descriptor(
            pointer, shape=[rows, columns], strides=[stride_r, 1], block_shape=[ROWS, COLUMNS]
        )
    else:
        return tl.make_tensor_descriptor(
            pointer, shape=[columns, rows], strides=[stride_c, 1], block_shape=[COLUMNS, ROWS]
        )


@triton.jit
def described_tile(described, row, column, BY_ROWS: tl.constexpr):
    """Return the tile of a described matrix at an element; what is beyond the matrix is 0."""
    if BY_ROWS:
        return described.load([row, column])
    else:
        return described.load([column, row]).T


@triton.jit
def add_described(
    acc, from_a, from_b, row, column, K, A_BY_ROWS: tl.constexpr, B_BY_ROWS: tl.constexpr, BK: tl.constexpr,
    HALF: tl.constexpr = False,
):  # fmt: skip
    """Return acc + a @ b over 0 <= k < K, of the tiles at ``row`` of a [M, K] and ``column`` of b [K, N]."""
    for k in range(0, K, BK):
        left = described_tile(from_a, row, k, A_BY_ROWS)
        acc = dot(left, described_tile(from_b, k, column, B_BY_ROWS), acc, HALF)
    return acc


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def sum_rows_of_a(
    a, stride_ar, stride_ak, rows_left, K, BM: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Return [BM] fp32: the sum of a's tile over all k, in one fixed order."""
    r, inner = tl.arange(0, BM), tl.arange(0, BK)
    if WIDE:
        r, inner = r.to(tl.int64), inner.to(tl.int64)
    offsets = r[:, None] * stride_ar + inner[None, :] * stride_ak
    total = tl.zeros((BM, BK), tl.float32)
    for k in range(0, K, BK):
        inside = (r < rows_left)[:, None] & (inner < K - k)[None, :]
        total += widen(tl.load(a + offsets, mask=inside, other=0.0))
        a += tl.cast(stride_ak, tl.int64) * BK
    return tl.sum(total, 1)


@triton.jit
def write_output(
    acc, bias, out, preact, offsets, inside, cols, in_cols,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP_PREACT: tl.constexpr,
):  # fmt: skip
    """Write z = acc + bias and act(z), each rounded once."""
    if HAS_BIAS:
        added = widen(tl.load(bias + cols, mask=in_cols, other=0.0))
        acc += added if len(acc.shape) == 1 else added[None, :]
    if KEEP_PREACT:
        tl.store(preact + offsets, narrow(acc, preact.dtype.element_ty), mask=inside)
    tl.store(out + offsets, narrow(activate(acc, ACTIVATION), out.dtype.element_ty), mask=inside)


@triton.jit
def write_main_grad(acc, main_grad, inv_scale, found_inf, offsets, inside, ACCUMULATE: tl.constexpr):
    """Compute main_grad (+)= inv_scale * acc, and found_inf = 1 if any of acc is not finite."""
    value = acc * tl.load(inv_scale)
    if ACCUMULATE:  # else a store without a load: 0 * inf of a stale buffer would be NaN
        value += tl.load(main_grad + offsets, mask=inside, other=0.0)
    tl.store(main_grad + offsets, value, mask=inside)
    overflow = tl.max((nonfinite(acc) & inside).to(tl.int32)) > 0
    tl.store(found_inf, 1.0, mask=overflow)  # only ever set, so concurrent programs agree
