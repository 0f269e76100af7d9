"""Cross-entropy of a vocabulary projection whose logits never exist whole.

Forward: every program walks over a share of the vocabulary's tiles with an online log-sum-exp (Milakov and Gimelshein,
arXiv:1805.02867) and leaves (maximum, sum, target's logit) for each of its rows; a second kernel combines the shares in
order. Backward: the logits' gradient, tile by tile from the kept log-sum-exp. Where cuBLAS makes the product, the same
is done on its logits for a bounded number of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spu.kernels.arith import narrow, widen
from spu.kernels.config import Config
from spu.kernels.kept import Launcher
from spu.kernels.launch import (
    ALIGN_BYTES,
    POINTWISE,
    can_describe,
    ceil_div,
    check_operands,
    config_for,
    descriptors_allowed,
    for_alignment,
    options,
    persistent_programs,
    programs_at_once,
)
from spu.kernels.table import follows_tables
from spu.kernels.tiles import EPILOGUE_COLUMNS, add_described, add_product, describe, halves, start_of, tile_at

_ROWS = 64  # of the combining kernel
_COLUMNS = 1024  # of the kernels on whole rows of logits
_CHUNK_BYTES = 256 << 20  # of logits at a time, where cuBLAS makes them
_SHARES_PER_PROCESSOR = 4
_INT32 = 2**31 - 1
_POINTER_COLUMNS = 128  # of tiles that are loaded by address


@triton.jit
def _take(top, total, z):
    """Return the running maximum and sum of exp(. - maximum) [BM] after the logits z [BM, BN]; masked ones are -inf."""
    new = tl.maximum(top, tl.max(z, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)


@triton.jit
def _take_columns(top, total, found, z, first_col, wanted, V, BM: tl.constexpr, COLUMNS: tl.constexpr):
    """Return (top, total, found) after a tile of logits; found is the target's logit. Wide tiles: in halves."""
    if COLUMNS > EPILOGUE_COLUMNS:
        left, right = halves(z, BM, COLUMNS)
        top, total, found = _take_columns(top, total, found, left, first_col, wanted, V, BM, COLUMNS // 2)
        top, total, found = _take_columns(
            top, total, found, right, first_col + COLUMNS // 2, wanted, V, BM, COLUMNS // 2
        )  # fmt: skip
    else:
        cols = first_col + tl.arange(0, COLUMNS)
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
    hidden, weight, target, parts, R, V, K, stride_hr, stride_hk, stride_wv, stride_wk, tiles_each,
    DESCRIBED: tl.constexpr, H_BY_ROWS: tl.constexpr, W_BY_ROWS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute parts [3, shares, R] fp32 from hidden [R, K], weight [V, K], target [R]. Grid (row tiles, shares).

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
        top, total, found = _take_columns(top, total, found, z, n * BN, wanted, V, BM, BN)
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
    if COLUMNS > EPILOGUE_COLUMNS:
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
def logits_dz_kernel(logits, target, lse, grad_rows, V, ignore_index, SIZE: tl.constexpr):
    """Replace stored logits [R, V] by their gradient. Grid (rows, column tiles)."""
    row = tl.program_id(0)
    cols = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    at = logits + row.to(tl.int64) * V + cols
    wanted = tl.load(target + row)
    z = widen(tl.load(at, mask=cols < V, other=0.0))
    grad = _loss(tl.load(grad_rows + row), wanted, V, ignore_index)
    value = (tl.exp(z - tl.load(lse + row)) - tl.where(cols == wanted, 1.0, 0.0)) * grad
    value = tl.where(wanted != ignore_index, value, 0.0)
    tl.store(at, narrow(value, logits.dtype.element_ty), mask=cols < V)


def _check(hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    check_operands("hidden and weight", hidden, weight)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [R, K] and [V, K]")
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 [{hidden.shape[0]}], got {target.dtype} {tuple(target.shape)}")


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    rows, row_bytes = hidden.shape[0], max(1, weight.shape[0] * hidden.element_size())
    step = max(1, _CHUNK_BYTES // row_bytes)
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return torch.mm(hidden, weight.t())


_LINEAR_CE, _LINEAR_CE_DZ = Launcher(linear_ce_kernel, {}), Launcher(linear_ce_dz_kernel, {})
_COMBINE = Launcher(combine_ce_kernel, POINTWISE)
_LOGITS_CE, _LOGITS_DZ = Launcher(logits_ce_kernel, POINTWISE), Launcher(logits_dz_kernel, POINTWISE)


class Plan(NamedTuple):
    """The constants of all calls of one shape; ``tiles_each`` and ``shares`` divide the vocabulary's tiles, and
    ``programs`` are the gradient's.
    """

    kind: str
    row_tiles: int
    tiles_each: int
    shares: int
    programs: int
    constants: dict[str, Any]
    dz_constants: dict[str, Any]  # of linear_ce_dz


@follows_tables
@lru_cache(maxsize=4096)
def _plan(
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, int, int],
    strides: tuple[int, ...],
    aligned: bool,
    override: Config | None,
) -> Plan:
    rows, v, k = shape
    config = override or for_alignment(config_for("linear_ce", dtype, device, shape), dtype, (*strides, shape[1]))
    described = config.kind == "descriptor" and k > 0 and can_describe(dtype, strides, aligned)
    if config.kind == "descriptor" and not described:
        config = dataclasses.replace(config, kind="tile", block_n=min(config.block_n, _POINTER_COLUMNS), blocks=1)
    row_tiles, column_tiles = ceil_div(rows, config.block_m), ceil_div(v, config.block_n)
    wanted = ceil_div(_SHARES_PER_PROCESSOR * programs_at_once(device), row_tiles)
    tiles_each = max(1, ceil_div(column_tiles, wanted))
    furthest = 2 * max(config.block_m, config.block_n, config.block_k) * (max(map(abs, strides)) + 1)
    constants: dict[str, Any] = {
        "DESCRIBED": described,
        "H_BY_ROWS": described and strides[1] == 1,
        "W_BY_ROWS": described and strides[2] == 1,  # of its transpose [K, V]
        "BM": config.block_m, "BN": config.block_n, "BK": config.block_k,
        "EVEN_K": described or k % config.block_k == 0, "WIDE": not described and furthest > _INT32,
    }  # fmt: skip
    shares = max(1, ceil_div(column_tiles, tiles_each))
    tiles = row_tiles * column_tiles
    programs = persistent_programs(tiles, config, device) if described else tiles
    constants |= options(config, dtype)
    of_dz = constants | {"GROUP_M": config.group_m}
    return Plan(config.kind, row_tiles, tiles_each, shares, programs, constants, of_dz)


def _aligned(hidden: Tensor, weight: Tensor) -> bool:
    return (hidden.data_ptr() | weight.data_ptr()) % ALIGN_BYTES == 0


def _descriptors(plan: Plan) -> AbstractContextManager[None]:
    return descriptors_allowed() if plan.kind == "descriptor" else nullcontext()


def linear_ce(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Return (loss, lse) of every row, fp32 [R]: lse = log sum exp(hidden @ weight.T), loss = lse - logit of the
    target.

    Args:
        hidden: [R, K]; fp16, bf16 or fp32, any strides.
        weight: [V, K], same dtype, any strides.
        target: int64 [R]; the loss of rows whose target is ``ignore_index`` is 0.
        config: instead of the table's.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    _check(hidden, weight, target)
    (rows, k), v = hidden.shape, weight.shape[0]
    loss, lse = (torch.empty(rows, dtype=torch.float32, device=hidden.device) for _ in range(2))
    if rows == 0:
        return loss, lse
    target = target.contiguous()
    strides = (*hidden.stride(), *weight.stride())
    plan = _plan(hidden.dtype, hidden.device, (rows, v, k), strides, _aligned(hidden, weight), config)
    if plan.kind == "torch":
        for part in _chunks(hidden, weight):
            logits = _logits(hidden[part], weight)
            variable = logits, target[part], loss[part], lse[part]
            _LOGITS_CE((logits.shape[0],), variable, (v, ignore_index, _COLUMNS))
        return loss, lse
    parts = torch.empty(3, plan.shares, rows, dtype=torch.float32, device=hidden.device)
    with _descriptors(plan):
        fixed = rows, v, k, *strides, plan.tiles_each
        _LINEAR_CE((plan.row_tiles, plan.shares), (hidden, weight, target, parts), fixed, plan.constants)
    _COMBINE((ceil_div(rows, _ROWS),), (parts, target, loss, lse), (rows, v, plan.shares, ignore_index, _ROWS))
    return loss, lse


def linear_ce_dz(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    grad_rows: Tensor,
    ignore_index: int,
    config: Config | None = None,
) -> Tensor:
    """Compute dz = (softmax(logits) - onehot(target)) * grad_rows -> [R, V] in the storage dtype, rounded once.

    Args:
        hidden, weight, target, ignore_index: as in ``linear_ce``.
        lse: fp32 [R], from ``linear_ce``.
        grad_rows: fp32 [R], the scaled gradient of each row's loss; not looked at in ignored rows.
    """
    _check(hidden, weight, target)
    (rows, k), v = hidden.shape, weight.shape[0]
    target, lse, grad_rows = target.contiguous(), lse.contiguous(), grad_rows.contiguous()
    if rows == 0 or v == 0:
        return torch.empty(rows, v, dtype=hidden.dtype, device=hidden.device)
    strides = (*hidden.stride(), *weight.stride())
    plan = _plan(hidden.dtype, hidden.device, (rows, v, k), strides, _aligned(hidden, weight), config)
    if plan.kind == "torch":
        dz = _logits(hidden, weight)
        grid = (rows, ceil_div(v, _COLUMNS))
        _LOGITS_DZ(grid, (dz, target, lse, grad_rows), (v, ignore_index, _COLUMNS))
        return dz
    dz = torch.empty(rows, v, dtype=hidden.dtype, device=hidden.device)
    with _descriptors(plan):
        variable = hidden, weight, target, lse, grad_rows, dz
        _LINEAR_CE_DZ((plan.programs,), variable, (rows, v, k, *strides, ignore_index), plan.dz_constants)
    return dz
