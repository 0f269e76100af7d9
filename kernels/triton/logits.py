"""Kernels of the cross-entropy of a vocabulary projection; ``cross_entropy.py`` launches them and says what they do."""

from __future__ import annotations

import triton
import triton.language as tl

from spu.kernels.arith import narrow, widen
from spu.kernels.tiles import add_described, add_product, describe, halves, is_wide, start_of, tile_at


@triton.jit
def _take(top, total, z):
    """Return the running maximum and sum of exp(. - maximum) [BM] after the logits z [BM, BN]; masked ones are -inf."""
    new = tl.maximum(top, tl.max(z, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)


@triton.jit
def _take_columns(
    top, total, found, z, logits, m, first_col, wanted, R, V,
    KEEP: tl.constexpr, BM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return (top, total, found) after a tile of logits; found is the target's logit. Wide tiles: in halves."""
    if is_wide(COLUMNS):
        left, right = halves(z, BM, COLUMNS)
        top, total, found = _take_columns(
            top, total, found, left, logits, m, first_col, wanted, R, V, KEEP, BM, COLUMNS // 2
        )  # fmt: skip
        top, total, found = _take_columns(
            top, total, found, right, logits, m, first_col + COLUMNS // 2, wanted, R, V, KEEP, BM, COLUMNS // 2
        )  # fmt: skip
    else:
        cols = first_col + tl.arange(0, COLUMNS)
        if KEEP:
            rows = m * BM + tl.arange(0, BM)
            at = rows[:, None].to(tl.int64) * V + cols[None, :]
            tl.store(logits + at, z, mask=(rows < R)[:, None] & (cols < V)[None, :])
        found += tl.sum(tl.where(cols[None, :] == wanted[:, None], z, 0.0), 1)
        top, total = _take(top, total, tl.where((cols < V)[None, :], z, float("-inf")))
    return top, total, found


@triton.jit
def _loss(value, wanted, V, ignore_index):
    """Return ``value`` for rows with a target, 0 for ignored ones, NaN where the target is outside the vocabulary."""
    value = tl.where((wanted >= 0) & (wanted < V), value, float("nan"))
    return tl.where(wanted != ignore_index, value, 0.0)


@triton.jit
def linear_ce_kernel(
    hidden, weight, target, parts, logits, R, V, K, stride_hr, stride_hk, stride_wv, stride_wk, tiles_each,
    KEEP: tl.constexpr, DESCRIBED: tl.constexpr, H_BY_ROWS: tl.constexpr, W_BY_ROWS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute parts [3, shares, R] fp32 from hidden [R, K], weight [V, K], target [R]. Grid (row tiles, shares).

    KEEP: also store logits [R, V] fp32.
    DESCRIBED: with tensor descriptors; BY_ROWS then tells which stride is 1, as in ``tiles.describe``.
    """
    m, share = tl.program_id(0), tl.program_id(1)
    rows = m * BM + tl.arange(0, BM)
    wanted = tl.load(target + rows, mask=rows < R, other=-1)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total, found = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    if DESCRIBED:
        from_hidden = describe(hidden, R, K, stride_hr, stride_hk, H_BY_ROWS, BM, BK)
        from_weight = describe(weight, K, V, stride_wk, stride_wv, W_BY_ROWS, BK, BN)
    for n in range(share * tiles_each, tl.minimum(tl.cdiv(V, BN), (share + 1) * tiles_each)):
        z = tl.zeros((BM, BN), tl.float32)
        if DESCRIBED:
            z = add_described(z, from_hidden, from_weight, m * BM, n * BN, K, H_BY_ROWS, W_BY_ROWS, BK)
        else:
            z = add_product(
                z,
                start_of(hidden, m * BM, stride_hr), stride_hr, stride_hk, R - m * BM,
                start_of(weight, n * BN, stride_wv), stride_wk, stride_wv, V - n * BN,
                0, K, hidden, hidden, 0, "none", BM, BN, BK, EVEN_K, WIDE,
            )  # fmt: skip
        top, total, found = _take_columns(
            top, total, found, z, logits, m, n * BN, wanted, R, V, KEEP, BM, BN
        )  # fmt: skip
    at = parts + share.to(tl.int64) * R + rows
    plane = tl.num_programs(1).to(tl.int64) * R
    tl.store(at, top, mask=rows < R)
    tl.store(at + plane, total, mask=rows < R)
    tl.store(at + 2 * plane, found, mask=rows < R)


@triton.jit
def combine_ce_kernel(parts, target, loss, lse, R, V, shares, ignore_index, ROWS: tl.constexpr):
    """Compute loss and lse [R] fp32 from the shares, in order."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < R
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total, found = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    plane = tl.cast(shares, tl.int64) * R
    at = parts + rows
    for _ in range(0, shares):
        part_top = tl.load(at, mask=inside, other=0.0)
        new = tl.maximum(top, part_top)
        shift = tl.where(new == float("-inf"), 0.0, new)
        part = tl.load(at + plane, mask=inside, other=0.0)
        total = total * tl.exp(top - shift) + part * tl.exp(part_top - shift)
        top = new
        found += tl.load(at + 2 * plane, mask=inside, other=0.0)
        at += R
    value = top + tl.log(total)
    wanted = tl.load(target + rows, mask=inside, other=0)
    tl.store(lse + rows, value, mask=inside)
    tl.store(loss + rows, _loss(value - found, wanted, V, ignore_index), mask=inside)


@triton.jit
def _write_dz(
    z, m, first_col, target, lse, grad_rows, dz, R, V, ignore_index, BM: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Write the gradient of a tile of logits; of a wide one in halves."""
    if is_wide(COLUMNS):
        left, right = halves(z, BM, COLUMNS)
        _write_dz(left, m, first_col, target, lse, grad_rows, dz, R, V, ignore_index, BM, COLUMNS // 2)
        _write_dz(
            right, m, first_col + COLUMNS // 2, target, lse, grad_rows, dz, R, V, ignore_index, BM, COLUMNS // 2
        )  # fmt: skip
    else:
        rows, cols = m * BM + tl.arange(0, BM), first_col + tl.arange(0, COLUMNS)
        wanted = tl.load(target + rows, mask=rows < R, other=0)
        level = tl.load(lse + rows, mask=rows < R, other=0.0)
        grad = _loss(tl.load(grad_rows + rows, mask=rows < R, other=0.0), wanted, V, ignore_index)
        value = tl.exp(z - level[:, None]) - tl.where(cols[None, :] == wanted[:, None], 1.0, 0.0)
        value = tl.where((wanted != ignore_index)[:, None], value * grad[:, None], 0.0)
        at = rows[:, None].to(tl.int64) * V + cols[None, :]
        tl.store(dz + at, narrow(value, dz.dtype.element_ty), mask=(rows < R)[:, None] & (cols < V)[None, :])


@triton.jit
def linear_ce_dz_kernel(
    hidden, weight, target, lse, grad_rows, dz, R, V, K, stride_hr, stride_hk, stride_wv, stride_wk, ignore_index,
    DESCRIBED: tl.constexpr, H_BY_ROWS: tl.constexpr, W_BY_ROWS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Compute dz [R, V] = (softmax(logits) - onehot(target)) * grad_rows, rounded once; 0 in ignored rows.

    DESCRIBED: persistent, with tensor descriptors; else one program a tile.
    """
    tiles_m, tiles_n = tl.cdiv(R, BM), tl.cdiv(V, BN)
    if DESCRIBED:
        from_hidden = describe(hidden, R, K, stride_hr, stride_hk, H_BY_ROWS, BM, BK)
        from_weight = describe(weight, K, V, stride_wk, stride_wv, W_BY_ROWS, BK, BN)
        for index in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
            m, n = tile_at(index, tiles_m, tiles_n, GROUP_M)
            z = tl.zeros((BM, BN), tl.float32)
            z = add_described(z, from_hidden, from_weight, m * BM, n * BN, K, H_BY_ROWS, W_BY_ROWS, BK)
            _write_dz(z, m, n * BN, target, lse, grad_rows, dz, R, V, ignore_index, BM, BN)
    else:
        m, n = tile_at(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
        z = add_product(
            tl.zeros((BM, BN), tl.float32),
            start_of(hidden, m * BM, stride_hr), stride_hr, stride_hk, R - m * BM,
            start_of(weight, n * BN, stride_wv), stride_wk, stride_wv, V - n * BN,
            0, K, hidden, hidden, 0, "none", BM, BN, BK, EVEN_K, WIDE,
        )  # fmt: skip
        _write_dz(z, m, n * BN, target, lse, grad_rows, dz, R, V, ignore_index, BM, BN)


@triton.jit
def logits_ce_kernel(logits, target, loss, lse, V, ignore_index, SIZE: tl.constexpr):
    """Compute loss and lse from stored logits [R, V], one row a program."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * V
    wanted = tl.load(target + row)
    top, total, found = float("-inf"), 0.0, 0.0
    for start in range(0, V, SIZE):
        cols = start + tl.arange(0, SIZE)
        z = widen(tl.load(logits + cols, mask=cols < V, other=0.0))
        found += tl.sum(tl.where((cols == wanted) & (cols < V), z, 0.0))
        z = tl.where(cols < V, z, float("-inf"))
        new = tl.maximum(top, tl.max(z))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift))
        top = new
    value = top + tl.log(total)
    tl.store(lse + row, value)
    tl.store(loss + row, _loss(value - found, wanted, V, ignore_index))


@triton.jit
def logits_dz_kernel(logits, dz, target, lse, grad_rows, V, ignore_index, SIZE: tl.constexpr):
    """Compute dz [R, V], which may be the logits' own memory, from stored logits. Grid (rows, column tiles)."""
    row = tl.program_id(0)
    cols = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    at = row.to(tl.int64) * V + cols
    wanted = tl.load(target + row)
    z = widen(tl.load(logits + at, mask=cols < V, other=0.0))
    grad = _loss(tl.load(grad_rows + row), wanted, V, ignore_index)
    value = (tl.exp(z - tl.load(lse + row)) - tl.where(cols == wanted, 1.0, 0.0)) * grad
    value = tl.where(wanted != ignore_index, value, 0.0)
    tl.store(dz + at, narrow(value, dz.dtype.element_ty), mask=cols < V)
