"""One matrix product with spu's epilogues: ``a [M, K] @ b [K, N]`` of any strides, in every kind of launch.

The epilogue is "output" (bias, activation, pre-activation; the forward, the input gradient, a plain weight gradient) or
"main_grad" (inv_scale, accumulation, found_inf, bias gradient). Kinds of launch are explained in ``config.Config``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spu.kernels.tiles import (
    add_described,
    add_product,
    describe,
    halves,
    is_wide,
    start_of,
    sum_rows_of_a,
    tile_at,
    write_main_grad,
    write_output,
)


@triton.jit
def _write_columns(
    acc, m, first_col, part, bias, out, extra, inv_scale, found_inf, M, N,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, EXTRA: tl.constexpr,
    ACCUMULATE: tl.constexpr, BM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, cols = m * BM + tl.arange(0, BM), first_col + tl.arange(0, COLUMNS)
    offsets = rows[:, None].to(tl.int64) * N + cols[None, :]
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    if EPILOGUE == "partial":  # out [parts, M, N] fp32
        tl.store(out + part.to(tl.int64) * M * N + offsets, acc, mask=inside)
    elif EPILOGUE == "main_grad":
        write_main_grad(acc, out, inv_scale, found_inf, offsets, inside, ACCUMULATE)
    else:
        write_output(acc, bias, out, extra, offsets, inside, cols, cols < N, ACTIVATION, HAS_BIAS, EXTRA)


@triton.jit
def _write_halves(
    acc, m, first_col, part, bias, out, extra, inv_scale, found_inf, M, N,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, EXTRA: tl.constexpr,
    ACCUMULATE: tl.constexpr, BM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if is_wide(COLUMNS):  # a wide tile and its whole epilogue at once do not fit the registers
        left, right = halves(acc, BM, COLUMNS)
        _write_halves(
            left, m, first_col, part, bias, out, extra, inv_scale, found_inf, M, N,
            EPILOGUE, ACTIVATION, HAS_BIAS, EXTRA, ACCUMULATE, BM, COLUMNS // 2,
        )  # fmt: skip
        _write_halves(
            right, m, first_col + COLUMNS // 2, part, bias, out, extra, inv_scale, found_inf, M, N,
            EPILOGUE, ACTIVATION, HAS_BIAS, EXTRA, ACCUMULATE, BM, COLUMNS // 2,
        )  # fmt: skip
    else:
        _write_columns(
            acc, m, first_col, part, bias, out, extra, inv_scale, found_inf, M, N,
            EPILOGUE, ACTIVATION, HAS_BIAS, EXTRA, ACCUMULATE, BM, COLUMNS,
        )  # fmt: skip


@triton.jit
def _write(
    acc, m, n, part, a, bias, out, extra, inv_scale, found_inf, M, N, K, stride_am, stride_ak,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, EXTRA: tl.constexpr,
    ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    _write_halves(
        acc, m, n * BN, part, bias, out, extra, inv_scale, found_inf, M, N,
        EPILOGUE, ACTIVATION, HAS_BIAS, EXTRA, ACCUMULATE, BM, BN,
    )  # fmt: skip
    if EPILOGUE == "main_grad" and EXTRA and n == 0:  # the bias gradient [M]: these programs read their rows again
        rows = m * BM + tl.arange(0, BM)
        sums = sum_rows_of_a(start_of(a, m * BM, stride_am), stride_am, stride_ak, M - m * BM, K, BM, BK, WIDE)
        write_main_grad(sums, extra, inv_scale, found_inf, rows, rows < M, ACCUMULATE)


@triton.jit
def _tile(
    index, part, a, b, bias, saved, dz, out, extra, inv_scale, found_inf, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, chunk,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, DERIVATIVE: tl.constexpr, HAS_BIAS: tl.constexpr,
    EXTRA: tl.constexpr, ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    m, n = tile_at(index, tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    k_first = part * chunk
    acc = add_product(
        tl.zeros((BM, BN), tl.float32),
        start_of(a, m * BM, stride_am), stride_am, stride_ak, M - m * BM,
        start_of(b, n * BN, stride_bn), stride_bk, stride_bn, N - n * BN,
        k_first, tl.minimum(K, k_first + chunk),
        start_of(saved, m * BM, stride_am), start_of(dz, m * BM, stride_am), n,
        DERIVATIVE, BM, BN, BK, EVEN_K, WIDE, HALF,
    )  # fmt: skip
    _write(
        acc, m, n, part, a, bias, out, extra, inv_scale, found_inf, M, N, K, stride_am, stride_ak,
        EPILOGUE, ACTIVATION, HAS_BIAS, EXTRA, ACCUMULATE, BM, BN, BK, WIDE,
    )  # fmt: skip


@triton.jit
def product_kernel(
    a, b, bias, saved, dz, out, extra, inv_scale, found_inf, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, chunk,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, DERIVATIVE: tl.constexpr, HAS_BIAS: tl.constexpr,
    EXTRA: tl.constexpr, ACCUMULATE: tl.constexpr, PERSISTENT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Compute a product tile by tile. Grid (tiles or fewer if PERSISTENT, parts of the inner dimension of ``chunk``
    each).
    """
    if PERSISTENT:
        for index in range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0)):
            _tile(
                index, tl.program_id(1), a, b, bias, saved, dz, out, extra, inv_scale, found_inf, M, N, K,
                stride_am, stride_ak, stride_bk, stride_bn, chunk,
                EPILOGUE, ACTIVATION, DERIVATIVE, HAS_BIAS, EXTRA, ACCUMULATE, BM, BN, BK, GROUP_M, EVEN_K, WIDE, HALF,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), tl.program_id(1), a, b, bias, saved, dz, out, extra, inv_scale, found_inf, M, N, K,
            stride_am, stride_ak, stride_bk, stride_bn, chunk,
            EPILOGUE, ACTIVATION, DERIVATIVE, HAS_BIAS, EXTRA, ACCUMULATE, BM, BN, BK, GROUP_M, EVEN_K, WIDE, HALF,
        )  # fmt: skip


@triton.jit
def descriptor_kernel(
    a, b, bias, saved, dz, out, extra, inv_scale, found_inf, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, chunk,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, EXTRA: tl.constexpr,
    ACCUMULATE: tl.constexpr, A_BY_ROWS: tl.constexpr, B_BY_ROWS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, WIDE: tl.constexpr,
    HALF: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Compute the persistent product with tensor descriptors (TMA). BY_ROWS: the operand's second stride is 1, else its
    first.

    Loads beyond the edges give zeros. FLAT: the two loops become one. (The arguments are product_kernel's; saved, dz
    and chunk are not used.)
    """
    from_a = describe(a, M, K, stride_am, stride_ak, A_BY_ROWS, BM, BK)
    from_b = describe(b, K, N, stride_bk, stride_bn, B_BY_ROWS, BK, BN)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLAT):
        m, n = tile_at(index, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BM, BN), tl.float32)
        acc = add_described(acc, from_a, from_b, m * BM, n * BN, K, A_BY_ROWS, B_BY_ROWS, BK, HALF)
        _write(
            acc, m, n, 0, a, bias, out, extra, inv_scale, found_inf, M, N, K, stride_am, stride_ak,
            EPILOGUE, ACTIVATION, HAS_BIAS, EXTRA, ACCUMULATE, BM, BN, BK, WIDE,
        )  # fmt: skip
