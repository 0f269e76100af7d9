"""Launches one product: looks its configuration up, chooses among the kernels, and keeps the static facts per shape."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spu.kernels import library
from spu.kernels.accumulation import SAMPLED_ROWS, wanted, watch_of
from spu.kernels.config import Config
from spu.kernels.finish import column_sums, finish, finish_main_grad, row_parts, wide_product
from spu.kernels.kept import Launch
from spu.kernels.launch import (
    ALIGN_BYTES,
    can_describe,
    ceil_div,
    config_for,
    descriptors_allowed,
    for_alignment,
    options,
    persistent_programs,
)
from spu.kernels.product import descriptor_kernel, product_kernel
from spu.kernels.table import follows_tables

_INT32 = 2**31 - 1
_POINTER_COLUMNS = 128


class Plan(NamedTuple):
    """The constants of all calls of one shape; ``launch`` is the kernel on its grid."""

    kind: str
    parts: int
    launch: Launch
    constants: dict[str, Any]
    algorithm: int


class Epilogue(NamedTuple):
    """The work on the fp32 accumulators. ``main_grad``: the fields up to bias_grad; otherwise those after it."""

    main_grad: bool = False
    inv_scale: Tensor | None = None
    found_inf: Tensor | None = None
    accumulate: bool = False
    bias_grad: Tensor | None = None
    bias: Tensor | None = None
    activation: str = "none"
    preact: Tensor | None = None


class Derivative(NamedTuple):
    """dz = dy * act'(saved) in place of the left operand, which is dy; dz is stored. All of one layout; kind "tile"."""

    activation: str
    saved: Tensor
    dz: Tensor


class Form(NamedTuple):
    """The static part of an epilogue and a derivative."""

    main_grad: bool = False
    activation: str = "none"
    has_bias: bool = False
    extra: bool = False
    accumulate: bool = False
    derivative: str = "none"


PLAIN = Epilogue()


@follows_tables
@lru_cache(maxsize=4096)
def plan(
    op: str,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, int, int],
    strides: tuple[int, ...],
    aligned: bool,
    form: Form,
    override: Config | None,
) -> Plan:
    """Return the launch of a product (M, N, K) with strides (am, ak, bk, bn)."""
    m, n, k = shape
    config = override or for_alignment(config_for(op, dtype, device, shape), dtype, (*strides, n))
    if config.kind == "descriptor" and (k == 0 or not can_describe(dtype, strides, aligned)):
        # Its loads take addresses from the registers that descriptors leave free.
        config = dataclasses.replace(config, kind="persistent", block_n=min(config.block_n, _POINTER_COLUMNS), blocks=1)
    kind = config.kind
    if kind == "cublaslt" and (k == 0 or not library.serves(dtype, device)):
        kind = "torch"
    parts = min(config.split_k, ceil_div(k, config.block_k)) if kind == "split" else 1
    if kind == "split" and parts < 2:
        kind, parts = "tile", 1
    chunk = ceil_div(ceil_div(k, parts), config.block_k) * config.block_k if parts > 1 else max(k, 1)
    if parts > 1:
        parts = ceil_div(k, chunk)
    programs = ceil_div(m, config.block_m) * ceil_div(n, config.block_n)
    if kind in ("persistent", "descriptor"):
        programs = persistent_programs(programs, config, device)
    split = kind == "split"
    constants: dict[str, Any] = {
        "EPILOGUE": "partial" if split else "main_grad" if form.main_grad else "output",
        "ACTIVATION": form.activation,
        "HAS_BIAS": form.has_bias and not split,
        "EXTRA": form.extra and not split,
        "ACCUMULATE": form.accumulate,
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
        "GROUP_M": config.group_m,
        "HALF": config.half and dtype == torch.float16,
        **options(config, dtype),
    }
    furthest = max(config.block_m, config.block_n, config.block_k) * (max(map(abs, strides)) + 1)
    constants["WIDE"] = furthest * 2 > _INT32
    kernel: Any = product_kernel
    if kind == "descriptor":
        kernel = descriptor_kernel
        constants |= {"A_BY_ROWS": strides[1] == 1, "B_BY_ROWS": strides[3] == 1}
        # Bias sums are a loop of their own in the epilogue, and Triton 3.6 fails to make one of three.
        constants["FLAT"] = config.flat and not (form.main_grad and form.extra)
    else:
        constants |= {"PERSISTENT": kind == "persistent", "EVEN_K": k % config.block_k == 0}
        constants["DERIVATIVE"] = form.derivative
    fixed = (m, n, k, *strides, chunk)
    return Plan(kind, parts, Launch(kernel, (programs, parts), fixed, constants), constants, config.algorithm)


def multiply(
    op: str,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    epilogue: Epilogue = PLAIN,
    derivative: Derivative | None = None,
    config: Config | None = None,
) -> None:
    """Compute out = epilogue(a @ b), accumulated in fp32.

    Args:
        op: whose row of the table is used: "linear", "linear_dx" or "linear_dw".
        a: [M, K] of any strides.
        b: [K, N] of any strides, a's dtype and device.
        out: [M, N], contiguous.
        derivative: makes a's place dz.
        config: instead of the table's.
    """
    if wanted() and derivative is None and out.numel() and (watch := watch_of(op, a, b)) is not None:
        found = config_for(op, a.dtype, a.device, (a.shape[0], b.shape[1], a.shape[1]))
        given = config or for_alignment(found, a.dtype, (*a.stride(), *b.stride(), b.shape[1]))
        config = _in_half(given)
        if given.kind not in ("torch", "cublaslt") and watch.due():
            step = max(1, a.shape[0] // SAMPLED_ROWS)
            rows = a[::step][:SAMPLED_ROWS]
            half, full = torch.empty(2, len(rows), b.shape[1], dtype=torch.float32, device=a.device)
            _multiply(op, rows, b, half, PLAIN, None, config)
            _multiply(op, rows, b, full, PLAIN, None, given)
            watch.compare(half, full)
    _multiply(op, a, b, out, epilogue, derivative, config)


@lru_cache(maxsize=256)
def _in_half(config: Config) -> Config:
    return dataclasses.replace(config, half=True)


def _multiply(
    op: str, a: Tensor, b: Tensor, out: Tensor, e: Epilogue, derivative: Derivative | None, config: Config | None
) -> None:
    (m, k), n = a.shape, b.shape[1]
    if m == 0 or n == 0:
        return
    aligned = (a.data_ptr() | b.data_ptr()) % ALIGN_BYTES == 0
    extra = e.bias_grad if e.main_grad else e.preact
    form = Form(
        e.main_grad, e.activation, e.bias is not None, extra is not None, e.accumulate,
        "none" if derivative is None else derivative.activation,
    )  # fmt: skip
    strides = a.stride() + b.stride()
    found = plan(op, a.dtype, a.device, (m, n, k), strides, aligned, form, config)
    if found.kind in ("torch", "cublaslt"):
        if found.kind == "torch" or not _by_library(a, b, out, e, found.algorithm):
            _by_torch(a, b, out, e)
        return
    target = out
    if found.kind == "split":
        target, extra = torch.empty(found.parts, m, n, dtype=torch.float32, device=a.device), None
    _, saved, dz = (None, a, a) if derivative is None else derivative
    arguments = (
        a, b, out if e.bias is None else e.bias, saved, dz, target, out if extra is None else extra,
        out if e.inv_scale is None else e.inv_scale, out if e.found_inf is None else e.found_inf,
    )  # fmt: skip
    if found.kind == "descriptor":
        with descriptors_allowed():
            found.launch(*arguments)
    else:
        found.launch(*arguments)
    if found.kind == "split":
        _finish(target, out, e, found.parts)
        _sum_bias(a, e)


def _finish(parts: Tensor, out: Tensor, e: Epilogue, count: int) -> None:
    if e.main_grad:
        assert e.inv_scale is not None
        assert e.found_inf is not None
        finish_main_grad(parts, out, e.inv_scale, e.found_inf, e.accumulate, count)
    else:
        finish(parts, out, count=count, bias=e.bias, activation=e.activation, preact=e.preact)


def _sum_bias(a: Tensor, e: Epilogue) -> None:
    """Compute the bias gradient in its own pass, where the product does not see whole rows of ``a`` [N, tokens]."""
    if e.bias_grad is not None:
        assert e.inv_scale is not None
        assert e.found_inf is not None
        add_column_sums(a.t(), e.bias_grad, e.inv_scale, e.found_inf, e.accumulate)


def add_column_sums(x: Tensor, main_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, accumulate: bool) -> None:
    """Compute main_grad [N] (+)= inv_scale * sum over rows of x [M, N]."""
    if x.shape[0] == 0:
        if not accumulate:
            main_grad.zero_()
        return
    parts, count = column_sums(x)
    finish_main_grad(parts, main_grad, inv_scale, found_inf, accumulate, count)


def _by_library(a: Tensor, b: Tensor, out: Tensor, e: Epilogue, algorithm: int) -> bool:
    """Multiply by cuBLASLt with its epilogue; False, with nothing done, if it takes no such product."""
    if not e.main_grad:
        return library.product(a, b, out, e.bias, e.activation, e.preact, algorithm)
    assert e.inv_scale is not None
    wanted = None if getattr(e.found_inf, "spu_left_to_norm", False) else e.found_inf  # it takes a pass of its own
    done = library.add_weight_gradient(a, b, out, e.inv_scale, wanted, e.accumulate, algorithm)
    if done:
        _sum_bias(a, e)
    return done


def _by_torch(a: Tensor, b: Tensor, out: Tensor, e: Epilogue) -> None:
    """Multiply by torch (cuBLAS on CUDA devices), then run our epilogue."""
    if e.main_grad:
        for part in row_parts(*out.shape):
            _finish(wide_product(a[part], b), out[part], e, 1)
        _sum_bias(a, e)
        return
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        if e.bias is None and e.activation == "none" and e.preact is None:
            torch.mm(a, b, out=out.view(a.shape[0], b.shape[1]))
            return
        # rounded here and once more after the activation, as in plain torch
        product = torch.mm(a, b) if e.bias is None else torch.addmm(e.bias, a, b)
    finish(product, out, activation=e.activation, preact=e.preact)
