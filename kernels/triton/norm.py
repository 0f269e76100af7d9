"""RMSNorm and LayerNorm: a program a row forward, a program for a share of the rows backward.

With n the normalised row and g = dy * weight: dx = rstd (g - n mean(g n)), for LayerNorm less mean(g) as well; the
parameters' gradients are fp32 sums of each share, added up in their order. Zhang and Sennrich, arXiv:1910.07467; Ba et
al., arXiv:1607.06450.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spu.kernels.arith import narrow, widen
from spu.kernels.finish import finish
from spu.kernels.kept import Launcher
from spu.kernels.launch import POINTWISE, STORAGE_DTYPES, ceil_div, programs_at_once, rows_of

LARGEST_ROW = 16384  # elements, in one program's registers
_KEPT_ROW = 8192  # elements; a longer row is read twice
_SHARES = 2  # programs of the backward a multiprocessor


@triton.jit
def _reciprocal_root(square, cols, eps):
    return tl.math.div_rn(1.0, tl.math.sqrt_rn(tl.math.div_rn(square, tl.cast(cols, tl.float32)) + eps))


@triton.jit
def norm_kernel(
    x, residual, weight, bias, y, mean, rstd, total, cols, eps, offset,
    LAYER: tl.constexpr, ROUNDED: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Normalise the row of x [rows, cols], or of x + residual, which is stored as ``total``, rounded, and used so."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, SIZE)
    at, inside = row * cols + col, col < cols
    v = widen(tl.load(x + at, mask=inside, other=0.0))
    if RESIDUAL:
        kept = narrow(v + widen(tl.load(residual + at, mask=inside, other=0.0)), total.dtype.element_ty)
        tl.store(total + at, kept, mask=inside)
        v = widen(kept)
    if LAYER:
        average = tl.math.div_rn(tl.sum(v, 0), tl.cast(cols, tl.float32))
        tl.store(mean + row, average)
        v = tl.where(inside, v - average, 0.0)
    root = _reciprocal_root(tl.sum(v * v, 0), cols, eps)
    tl.store(rstd + row, root)
    v = v * root
    if ROUNDED:
        v = widen(narrow(v, y.dtype.element_ty))
    if WEIGHT:
        v = v * (widen(tl.load(weight + col, mask=inside, other=0.0)) + offset)
    if BIAS:
        v = v + widen(tl.load(bias + col, mask=inside, other=0.0))
    tl.store(y + at, narrow(v, y.dtype.element_ty), mask=inside)


@triton.constexpr_function
def is_long(size, dtype):
    """Tell whether a row, its gradient and the sums for both parameters do not fit the registers at once; in 16 bits,
    since a second reading of fp32 costs as much as what it saves.
    """
    return size > _KEPT_ROW and dtype != tl.float32


@triton.jit
def _scale(weight, col, inside, offset, WEIGHT: tl.constexpr, SIZE: tl.constexpr):
    scale = tl.full((SIZE,), 1.0, tl.float32)
    if WEIGHT:
        scale = widen(tl.load(weight + col, mask=inside, other=0.0)) + offset
    return scale


@triton.jit
def _normalised(dy, x, mean, root, row, at, inside, LAYER: tl.constexpr, USE: tl.constexpr):
    """Return a row's gradient and the normalised row. USE: how a cache keeps them; what is read in two ways is read
    twice.
    """
    d = widen(tl.load(dy + at, mask=inside, other=0.0, eviction_policy=USE))
    n = widen(tl.load(x + at, mask=inside, other=0.0, eviction_policy=USE))
    if LAYER:
        n = tl.where(inside, n - tl.load(mean + row), 0.0)
    return d, n * root


@triton.jit
def _means(g, n, cols, LAYER: tl.constexpr):
    """Return the means of g * n and, for LAYER, of g."""
    along = tl.math.div_rn(tl.sum(g * n, 0), tl.cast(cols, tl.float32))
    shift = along
    if LAYER:
        shift = tl.math.div_rn(tl.sum(g, 0), tl.cast(cols, tl.float32))
    return along, shift


@triton.jit
def norm_backward_kernel(
    dy, dsum, x, weight, mean, rstd, dx, dw, db, rows, cols, share, offset,
    LAYER: tl.constexpr, ROUNDED: tl.constexpr, DSUM: tl.constexpr, WEIGHT: tl.constexpr, DX: tl.constexpr,
    DW: tl.constexpr, DB: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Compute dx of ``share`` rows, and their sums for weight and bias as a row of dw and db [programs, cols]."""
    first = tl.program_id(0) * share
    col = tl.arange(0, SIZE)
    inside = col < cols
    LONG: tl.constexpr = is_long(SIZE, x.dtype.element_ty)
    if not LONG:
        scale = _scale(weight, col, inside, offset, WEIGHT, SIZE)
    sum_w, sum_b = tl.zeros((SIZE,), tl.float32), tl.zeros((SIZE,), tl.float32)
    for row in range(first, tl.minimum(rows, first + share)):
        at = tl.cast(row, tl.int64) * cols + col
        root = tl.load(rstd + row)
        if DX and LONG:
            d, n = _normalised(dy, x, mean, root, row, at, inside, LAYER, "evict_last")
            g = d * _scale(weight, col, inside, offset, WEIGHT, SIZE)
            along, shift = _means(g, n, cols, LAYER)
        d, n = _normalised(dy, x, mean, root, row, at, inside, LAYER, "")
        if DW:
            sum_w += d * (widen(narrow(n, x.dtype.element_ty)) if ROUNDED else n)
        if DB:
            sum_b += d
        if DX:
            if LONG:
                g = d * _scale(weight, col, inside, offset, WEIGHT, SIZE)
            else:
                g = d * scale
                along, shift = _means(g, n, cols, LAYER)
            if LAYER:
                g = g - shift
            g = (g - n * along) * root
            if DSUM:
                g = g + widen(tl.load(dsum + at, mask=inside, other=0.0))
            tl.store(dx + at, narrow(g, dx.dtype.element_ty), mask=inside)
    out = tl.program_id(0).to(tl.int64) * cols + col
    if DW:
        tl.store(dw + out, sum_w, mask=inside)
    if DB:
        tl.store(db + out, sum_b, mask=inside)


_NORM, _BACKWARD = Launcher(norm_kernel, POINTWISE), Launcher(norm_backward_kernel, POINTWISE)


@lru_cache(maxsize=1024)
def _options(cols: int) -> dict[str, Any]:
    warps = 4 if cols <= 1024 else 8 if cols <= 4096 else 16
    return {"SIZE": triton.next_power_of_2(max(1, cols)), "num_warps": warps, "enable_fp_fusion": False}


def _check(x: Tensor, others: tuple[Tensor | None, ...], vectors: tuple[Tensor | None, ...]) -> None:
    if x.dim() == 0 or x.dtype not in STORAGE_DTYPES:
        raise TypeError(f"x is {x.dtype} {tuple(x.shape)}: give float16, bfloat16 or float32 of shape [..., C]")
    if x.shape[-1] > LARGEST_ROW:
        raise ValueError(f"rows of {x.shape[-1]} elements do not fit a program: at most {LARGEST_ROW}")
    for other in others:
        if other is not None and (other.shape, other.dtype, other.device) != (x.shape, x.dtype, x.device):
            raise ValueError(f"{other.dtype} {tuple(other.shape)} beside x {x.dtype} {tuple(x.shape)}: need the same")
    for vector in vectors:
        if vector is not None and (vector.shape != x.shape[-1:] or vector.device != x.device):
            raise ValueError(f"weight or bias {tuple(vector.shape)} does not fit rows of {x.shape[-1]} on {x.device}")


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    layer: bool,
    rounded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, (residual,), (weight, bias))
    rows = rows_of(x).contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if layer else rstd
    total = y.new_empty(0) if residual is None else torch.empty_like(y)
    other = rows if residual is None else residual.contiguous()
    vectors = [rows if vector is None else vector.contiguous() for vector in (weight, bias)]
    if rows.shape[0]:
        _NORM(
            (rows.shape[0],),
            (rows, other, *vectors, y, mean, rstd, total),
            (
                rows.shape[1], eps, offset, layer, rounded, residual is not None, weight is not None, bias is not None,
            ),
            _options(rows.shape[1]),
        )  # fmt: skip
    return y, mean, rstd, total


def _backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    offset: float,
    layer: bool,
    rounded: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, (dy, dsum), (weight,))
    rows, grads = rows_of(x).contiguous(), rows_of(dy).contiguous()
    count, cols = rows.shape
    programs = max(1, min(count, _SHARES * programs_at_once(x.device)))
    dx = torch.empty(x.shape if needs[0] else (0,), dtype=x.dtype, device=x.device)
    parts = torch.empty((2, programs, cols), dtype=torch.float32, device=x.device)
    sums = [torch.empty(cols if needed else 0, dtype=torch.float32, device=x.device) for needed in needs[1:]]
    if not count:
        return dx, sums[0].zero_(), sums[1].zero_()
    share = ceil_div(count, programs)
    programs = ceil_div(count, share)
    others = grads if dsum is None else dsum.contiguous(), rows, rows if weight is None else weight.contiguous()
    _BACKWARD(
        (programs,),
        (grads, *others, mean, rstd, dx, parts[0], parts[1]),
        (count, cols, share, offset, layer, rounded, dsum is not None, weight is not None, *needs),
        _options(cols),
    )
    for part, total, needed in zip(parts, sums, needs[1:], strict=True):
        if needed:
            finish(part, total, count=programs)
    return dx, *sums  # type: ignore[return-value]


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, 1 / sqrt(mean(v^2) + eps), v) of rows v = x + residual; see ``spu.ops.norm``.

    Args:
        x, residual: [..., C], C at most ``LARGEST_ROW``; fp16, bf16 or fp32.
        weight: [C], in any storage dtype.

    Raises:
        ValueError: shapes that do not fit, or rows that are too long.
        TypeError: another dtype.
    """
    y, _, rstd, total = _forward(x, residual, weight, None, eps, offset, False, rounded)
    return y, rstd, total


def rms_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    rounded: bool,
    needs_dx: bool,
    needs_dw: bool,
) -> tuple[Tensor, Tensor]:
    """Return dx, with dsum added, and dw in fp32; what is not needed is empty."""
    needs = needs_dx, needs_dw, False
    return _backward(dy, dsum, x, weight, rstd, rstd, offset, False, rounded, needs)[:2]


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (y, mean, 1 / sqrt(variance + eps), v) of rows v = x + residual; see ``rms_norm``."""
    return _forward(x, residual, weight, bias, eps, 0.0, True, False)


def layer_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs_dx: bool,
    needs_dw: bool,
    needs_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, with dsum added, dw and db in fp32; what is not needed is empty."""
    return _backward(dy, dsum, x, weight, mean, rstd, 0.0, True, False, (needs_dx, needs_dw, needs_db))
