"""Epilogues as kernels of their own: after a split product, after a product by cuBLAS, and for gradients of others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from spu.kernels.arith import backprop, narrow, widen
from spu.kernels.kept import Launcher
from spu.kernels.launch import POINTWISE, ceil_div
from spu.kernels.tiles import write_main_grad, write_output

SIZE = 1024
SUM_COLUMNS, SUM_ROWS = 64, 32
_ROWS_A_PART = 512
_MOST_PARTS = 64
WIDE_BYTES = 64 << 20  # of products in fp32 at a time: a whole weight's would be as large as its gradient


@triton.jit
def finish_kernel(
    parts, bias, out, extra, inv_scale, found_inf, numel, N, count,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, EXTRA: tl.constexpr,
    ACCUMULATE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Apply the epilogue to the sum of ``count`` parts [count, numel], added up in order; N columns."""
    offsets = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = offsets < numel
    acc = widen(tl.load(parts + offsets, mask=inside, other=0.0))
    for _ in range(1, count):
        parts += numel
        acc += widen(tl.load(parts + offsets, mask=inside, other=0.0))
    if EPILOGUE == "main_grad":
        write_main_grad(acc, out, inv_scale, found_inf, offsets, inside, ACCUMULATE)
    else:
        write_output(acc, bias, out, extra, offsets, inside, offsets % N, inside, ACTIVATION, HAS_BIAS, EXTRA)


@triton.jit
def dz_kernel(dy, saved, dz, numel, ACTIVATION: tl.constexpr, SIZE: tl.constexpr):
    """Compute dz = dy * act'(saved), rounded once."""
    offsets = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = offsets < numel
    value = backprop(
        widen(tl.load(dy + offsets, mask=inside, other=0.0)),
        widen(tl.load(saved + offsets, mask=inside, other=0.0)),
        ACTIVATION,
    )
    tl.store(dz + offsets, narrow(value, dz.dtype.element_ty), mask=inside)


@triton.jit
def column_sum_kernel(x, parts, M, N, stride_m, stride_n, chunk, BM: tl.constexpr, BN: tl.constexpr):
    """Compute parts [P, N] fp32: the sums over ``chunk`` rows each of x [M, N]."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(1) * chunk
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(first, tl.minimum(M, first + chunk), BM):
        rows = start + tl.arange(0, BM)
        inside = (rows < tl.minimum(M, first + chunk))[:, None] & (cols < N)[None, :]
        at = rows[:, None].to(tl.int64) * stride_m + cols[None, :].to(tl.int64) * stride_n
        total += widen(tl.load(x + at, mask=inside, other=0.0))
    tl.store(parts + tl.program_id(1).to(tl.int64) * N + cols, tl.sum(total, 0), mask=cols < N)


_FINISH, _DZ = Launcher(finish_kernel, POINTWISE), Launcher(dz_kernel, POINTWISE)
_COLUMN_SUM = Launcher(column_sum_kernel, POINTWISE)


def finish(
    parts: Tensor,
    out: Tensor,
    *,
    count: int = 1,
    bias: Tensor | None = None,
    activation: str = "none",
    preact: Tensor | None = None,
) -> None:
    """Compute z = parts.sum(0) + bias, out = act(z) and preact = z, each rounded once; parts [count, *out.shape]."""
    numel = out.numel()
    if numel:
        _FINISH(
            (ceil_div(numel, SIZE),),
            (parts, out if bias is None else bias, out, out if preact is None else preact, out, out),
            (
                numel, out.shape[-1], count, "output", activation, bias is not None, preact is not None, False, SIZE,
            ),
        )  # fmt: skip


def finish_main_grad(
    parts: Tensor, main_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, accumulate: bool, count: int = 1
) -> None:
    """Compute main_grad (+)= inv_scale * parts.sum(0), found_inf |= not finite; parts [count, *main_grad.shape],
    contiguous.
    """
    numel = main_grad.numel()
    if numel:
        _FINISH(
            (ceil_div(numel, SIZE),),
            (parts, main_grad, main_grad, main_grad, inv_scale, found_inf),
            (numel, 1, count, "main_grad", "none", False, False, accumulate, SIZE),
        )


def dz_of(dy: Tensor, saved: Tensor, activation: str) -> Tensor:
    """Compute dz = dy * act'(saved), contiguous, in dy's dtype."""
    dz = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    numel = dz.numel()
    if numel:
        _DZ((ceil_div(numel, SIZE),), (dy.contiguous(), saved.contiguous(), dz), (numel, activation, SIZE))
    return dz


def column_sums(x: Tensor) -> tuple[Tensor, int]:
    """Return (parts [P, N] fp32, P): sums over equal shares of the rows of x [M, N], M > 0; their sum is the column
    sum.
    """
    m, n = x.shape
    count = min(_MOST_PARTS, ceil_div(m, _ROWS_A_PART))
    chunk = ceil_div(ceil_div(m, count), SUM_ROWS) * SUM_ROWS
    parts = torch.empty(count, n, dtype=torch.float32, device=x.device)
    if n:
        grid = ceil_div(n, SUM_COLUMNS), count
        _COLUMN_SUM(grid, (x, parts), (m, n, *x.stride(), chunk, SUM_ROWS, SUM_COLUMNS))
    return parts, count


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in fp32, by cuBLAS on a GPU."""
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        if a.device.type == "cuda" and a.dtype != torch.float32:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a.float(), b.float())


def row_parts(rows: int, columns: int) -> Iterator[slice]:
    """Yield ranges of rows whose products take ``WIDE_BYTES`` in fp32, or a row."""
    step = max(1, WIDE_BYTES // (4 * max(1, columns)))
    return (slice(first, min(rows, first + step)) for first in range(0, rows, step))
