"""Launches one product: looks its configuration up, chooses among the kernels, and keeps the static facts per shape."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .finish import column_sums, dz_of, finish, finish_main_grad
from .launch import allow_descriptors, ceil_div, config_for, options, programs_at_once
from .product import descriptor_kernel, product_kernel
from .table import Config

_INT32 = 2**31 - 1
_TENSOR_MEMORY_ALIGN_BYTES = 16


class Plan(NamedTuple):
    """What does not change between calls of one shape."""

    kind: str
    grid: tuple[int, int]
    chunk: int
    constants: dict[str, Any]


class Epilogue(NamedTuple):
    """What happens to the fp32 accumulators. ``main_grad``: the fields up to bias_grad; otherwise those after it."""

    main_grad: bool = False
    inv_scale: Tensor | None = None
    found_inf: Tensor | None = None
    accumulate: bool = False
    bias_grad: Tensor | None = None
    bias: Tensor | None = None
    activation: str = "none"
    preact: Tensor | None = None


class Derivative(NamedTuple):
    """dz = dy * act'(saved) in place of the left operand, which is dy; dz is stored. All of one layout."""

    activation: str
    saved: Tensor
    dz: Tensor


PLAIN = Epilogue()


def _can_describe(dtype: torch.dtype, strides: tuple[int, ...], aligned: bool) -> bool:
    """Whether tensor descriptors can load both operands: one stride of each is 1, the other a multiple of 16 bytes."""
    if dtype == torch.float32 or not aligned:
        return False
    for first, second in (strides[:2], strides[2:]):
        other = first if second == 1 else second if first == 1 else 0
        if other <= 0 or other * dtype.itemsize % _TENSOR_MEMORY_ALIGN_BYTES:
            return False
    return True


@lru_cache(maxsize=4096)
def plan(
    op: str,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, int, int],
    strides: tuple[int, int, int, int],
    aligned: bool,
    derivative: bool,
    override: Config | None,
) -> Plan:
    """The launch of a product (M, N, K) with strides (am, ak, bk, bn)."""
    m, n, k = shape
    config = override or config_for(op, dtype, device, shape)
    kind = config.kind
    if kind == "descriptor" and (derivative or k == 0 or not _can_describe(dtype, strides, aligned)):
        kind = "persistent"
    parts = min(config.split_k, ceil_div(k, config.block_k)) if kind == "split" else 1
    if kind == "split" and (parts < 2 or derivative):
        kind, parts = "tile", 1
    chunk = ceil_div(ceil_div(k, parts), config.block_k) * config.block_k if parts > 1 else max(k, 1)
    if parts > 1:
        parts = ceil_div(k, chunk)
    programs = ceil_div(m, config.block_m) * ceil_div(n, config.block_n)
    if kind in ("persistent", "descriptor"):
        programs = min(programs, programs_at_once(device))
    constants: dict[str, Any] = {"BM": config.block_m, "BN": config.block_n, "BK": config.block_k}
    constants |= {"GROUP_M": config.group_m, **options(config, dtype)}
    furthest = max(config.block_m, config.block_n, config.block_k) * (max(map(abs, strides)) + 1)
    constants["WIDE"] = furthest * 2 > _INT32
    if kind == "descriptor":
        constants |= {"A_BY_ROWS": strides[1] == 1, "B_BY_ROWS": strides[3] == 1}
    else:
        constants |= {"PERSISTENT": kind == "persistent", "EVEN_K": k % config.block_k == 0}
    return Plan(kind, (programs, parts), chunk, constants)


def multiply(
    op: str,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    epilogue: Epilogue = PLAIN,
    derivative: Derivative | None = None,
    config: Config | None = None,
) -> None:
    """out = epilogue(a @ b), accumulated in fp32.

    Args:
        op: whose row of the table is used: "linear", "linear_dx" or "linear_dw".
        a: [M, K] of any strides.
        b: [K, N] of any strides, a's dtype and device.
        out: [M, N], contiguous.
        derivative: makes a's place dz.
        config: instead of the table's.
    """
    (m, k), n = a.shape, b.shape[1]
    if m == 0 or n == 0:
        return
    aligned = a.data_ptr() % _TENSOR_MEMORY_ALIGN_BYTES == 0 and b.data_ptr() % _TENSOR_MEMORY_ALIGN_BYTES == 0
    strides = (*a.stride(), *b.stride())
    found = plan(op, a.dtype, a.device, (m, n, k), strides, aligned, derivative is not None, config)
    if found.kind == "torch":
        _by_torch(a, b, out, epilogue, derivative)
        return
    split = found.kind == "split"
    target = torch.empty(found.grid[1], m, n, dtype=torch.float32, device=a.device) if split else out
    e, where = epilogue, a if derivative is None else derivative.saved
    extra = None if split else e.bias_grad if e.main_grad else e.preact
    constants = dict(
        found.constants,
        EPILOGUE="partial" if split else "main_grad" if e.main_grad else "output",
        ACTIVATION=e.activation,
        HAS_BIAS=e.bias is not None and not split,
        EXTRA=extra is not None,
        ACCUMULATE=e.accumulate,
    )
    kernel: Any = product_kernel
    if found.kind == "descriptor":
        kernel = descriptor_kernel
        allow_descriptors()
    else:
        constants["DERIVATIVE"] = "none" if derivative is None else derivative.activation
    kernel[found.grid](
        a, b, out if e.bias is None else e.bias, where, a if derivative is None else derivative.dz,
        target, out if extra is None else extra, out if e.inv_scale is None else e.inv_scale,
        out if e.found_inf is None else e.found_inf, m, n, k, *strides, found.chunk, **constants,
    )  # fmt: skip
    if split:
        _finish(target, out, epilogue, found.grid[1])
        _sum_bias(a, epilogue)


def _finish(parts: Tensor, out: Tensor, e: Epilogue, count: int) -> None:
    if e.main_grad:
        assert e.inv_scale is not None
        assert e.found_inf is not None
        finish_main_grad(parts, out, e.inv_scale, e.found_inf, e.accumulate, count)
    else:
        finish(parts, out, count=count, bias=e.bias, activation=e.activation, preact=e.preact)


def _sum_bias(a: Tensor, e: Epilogue) -> None:
    """The bias gradient by a pass of its own, where the product does not see whole rows of ``a`` [N, tokens]."""
    if e.bias_grad is not None:
        assert e.inv_scale is not None
        assert e.found_inf is not None
        add_column_sums(a.t(), e.bias_grad, e.inv_scale, e.found_inf, e.accumulate)


def add_column_sums(x: Tensor, main_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, accumulate: bool) -> None:
    """main_grad [N] (+)= inv_scale * sum over rows of x [M, N]."""
    if x.shape[0] == 0:
        if not accumulate:
            main_grad.zero_()
        return
    parts, count = column_sums(x)
    finish_main_grad(parts, main_grad, inv_scale, found_inf, accumulate, count)


def _by_torch(a: Tensor, b: Tensor, out: Tensor, e: Epilogue, derivative: Derivative | None) -> None:
    """The product by torch (cuBLAS on CUDA devices), then our epilogue."""
    if derivative is not None:
        derivative.dz.copy_(dz_of(a, derivative.saved, derivative.activation))
        a = derivative.dz
    with torch.autocast(a.device.type, enabled=False):
        if e.main_grad:
            if a.device.type == "cuda" and a.dtype != torch.float32:
                product = torch.mm(a, b, out_dtype=torch.float32)
            else:
                product = torch.mm(a.float(), b.float())
        elif e.bias is None and e.activation == "none" and e.preact is None and a.device.type == "cuda":
            torch.mm(a, b, out=out)
            return
        else:  # rounded here and once more after the activation, as in plain torch
            product = torch.mm(a, b) if e.bias is None else torch.addmm(e.bias, a, b)
    if e.main_grad:
        _finish(product, out, e, 1)
        _sum_bias(a, e)
    else:
        finish(product, out, activation=e.activation, preact=e.preact)
