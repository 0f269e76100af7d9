"""The gated half of an MLP (SwiGLU and its family, arXiv:2002.05202): h = act(x @ w_gate.T) * (x @ w_up.T).

The forward makes both products in one kernel that reads x once. Its backward recomputes h instead of keeping it, in
the epilogue of the product that makes dh (which is never stored), and adds both input gradients in one accumulator.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spu.kernels.arith import activate, backprop, narrow, widen
from spu.kernels.config import Config
from spu.kernels.finish import SIZE, row_parts, wide_product
from spu.kernels.gated_products import (
    gated_dh_descriptor_kernel,
    gated_dh_kernel,
    gated_dx_descriptor_kernel,
    gated_dx_kernel,
    gated_linear_descriptor_kernel,
    gated_linear_kernel,
)
from spu.kernels.kept import Launcher
from spu.kernels.launch import (
    ALIGN_BYTES,
    POINTWISE,
    can_describe,
    ceil_div,
    check_activation,
    check_operands,
    config_for,
    descriptors_allowed,
    for_alignment,
    options,
    persistent_programs,
    rows_of,
)
from spu.kernels.table import follows_tables

_INT32 = 2**31 - 1
# Columns of tiles that are loaded by address, and the operands as the kernels name them.
_POINTER_COLUMNS = {"gated_linear": 64, "gated_dh": 128, "gated_dx": 128, "mlp_dz": 128}
_OPERANDS = {"gated_linear": "XGU", "gated_dh": "DW", "gated_dx": "GUWV", "mlp_dz": "DW"}


@triton.jit
def gated_dz_kernel(
    dh, gate, up, dgate, dup, h, numel, ACTIVATION: tl.constexpr, GRADIENTS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Compute h = act(gate) * up; with GRADIENTS dgate = dh * up * act'(gate), dup = dh * act(gate). fp32, rounded
    once.
    """
    offsets = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = offsets < numel
    g = widen(tl.load(gate + offsets, mask=inside, other=0.0))
    u = widen(tl.load(up + offsets, mask=inside, other=0.0))
    act = activate(g, ACTIVATION)
    tl.store(h + offsets, narrow(act * u, h.dtype.element_ty), mask=inside)
    if GRADIENTS:
        d = widen(tl.load(dh + offsets, mask=inside, other=0.0))
        tl.store(dgate + offsets, narrow(backprop(d * u, g, ACTIVATION), dgate.dtype.element_ty), mask=inside)
        tl.store(dup + offsets, narrow(d * act, dup.dtype.element_ty), mask=inside)


class Plan(NamedTuple):
    """The launch of all calls of one shape; ``kind`` is the configuration's."""

    kind: str
    grid: tuple[int]
    constants: dict[str, Any]


@follows_tables
@lru_cache(maxsize=4096)
def plan_of(
    op: str,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, int, int],
    strides: tuple[int, ...],
    begins_aligned: bool,
    override: Config | None,
) -> Plan:
    """Return the launch of a product; ``strides`` are those of all operands, two each; ``aligned`` tells of them."""
    config = override or for_alignment(config_for(op, dtype, device, shape), dtype, (*strides, shape[1]))
    m, n, k = shape
    if config.kind == "descriptor" and (k == 0 or not can_describe(dtype, strides, begins_aligned)):
        columns, stages = min(config.block_n, _POINTER_COLUMNS[op]), min(config.num_stages, 3)
        config = dataclasses.replace(config, kind="tile", block_n=columns, num_stages=stages, blocks=1)
    constants: dict[str, Any] = {
        "BM": config.block_m, "BN": config.block_n, "BK": config.block_k, "GROUP_M": config.group_m,
    }  # fmt: skip
    programs = ceil_div(m, config.block_m) * ceil_div(n, config.block_n)
    if config.kind == "descriptor":
        programs = persistent_programs(programs, config, device)
        constants |= {f"{name}_BY_ROWS": stride == 1 for name, stride in zip(_OPERANDS[op], strides[1::2], strict=True)}
    elif op != "gated_linear":
        constants |= {"EVEN_K": k % config.block_k == 0, "WIDE": _wide(config, strides)}
    return Plan(config.kind, (programs,), constants | options(config, dtype))


def _wide(config: Config, strides: tuple[int, ...]) -> bool:
    """Tell whether offsets within a tile leave 32 bits."""
    return 2 * max(config.block_m, config.block_n, config.block_k) * (max(map(abs, strides)) + 1) > _INT32


def aligned(*operands: Tensor) -> bool:
    """Tell whether all begin where descriptors and wide loads can."""
    return all(operand.data_ptr() % ALIGN_BYTES == 0 for operand in operands)


_GATED_DZ = Launcher(gated_dz_kernel, POINTWISE)
_LAUNCHERS = {
    "gated_linear": (Launcher(gated_linear_kernel, {}), Launcher(gated_linear_descriptor_kernel, {})),
    "gated_dh": (Launcher(gated_dh_kernel, {}), Launcher(gated_dh_descriptor_kernel, {})),
    "gated_dx": (Launcher(gated_dx_kernel, {}), Launcher(gated_dx_descriptor_kernel, {})),
}


def launch(
    kernels: tuple[Launcher, Launcher], plan: Plan, variable: tuple[Tensor, ...], fixed: tuple[Any, ...]
) -> None:
    """Launch a product: of its two kernels the one that loads by address, or the one with descriptors."""
    by_pointers, by_descriptors = kernels
    if plan.kind == "descriptor":
        with descriptors_allowed():
            by_descriptors(plan.grid, variable, fixed, plan.constants)
    else:
        by_pointers(plan.grid, variable, fixed, plan.constants)


def _check_weights(w_gate: Tensor, w_up: Tensor) -> None:
    if w_gate.dim() != 2 or w_gate.shape != w_up.shape:
        raise ValueError(
            f"w_gate {tuple(w_gate.shape)} and w_up {tuple(w_up.shape)} must both be [N, K] of the same N and K"
        )


def gated_linear(
    x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str, keep: bool = True, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute h = act(gate) * up, gate = x @ w_gate.T, up = x @ w_up.T, accumulated in fp32; each rounded once.

    Args:
        x: [..., K]; fp16, bf16 or fp32, any strides.
        w_gate, w_up: [N, K], x's dtype, any strides.
        activation: one of none, relu, gelu, gelu_tanh, silu.
        keep: also store gate and up, for the backward.
        config: instead of the table's.

    Returns:
        (h, gate, up), each [..., N], contiguous; gate and up empty [0] unless kept.

    Raises:
        ValueError, TypeError: unknown activation; shapes, dtypes or devices that do not fit.
    """
    check_activation(activation)
    check_operands("x, w_gate and w_up", x, w_gate, w_up)
    _check_weights(w_gate, w_up)
    if x.dim() == 0 or x.shape[-1] != w_gate.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and w_gate {tuple(w_gate.shape)} do not fit: need [..., K] and [N, K]")
    rows, n = rows_of(x), w_gate.shape[0]
    m, k = rows.shape
    h = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    gate, up = (torch.empty_like(h) if keep else h.new_empty(0) for _ in range(2))
    if h.numel() == 0:
        return h, gate, up
    # the weights as [K, N]
    strides = (*rows.stride(), *w_gate.stride()[::-1], *w_up.stride()[::-1])
    plan = plan_of("gated_linear", x.dtype, x.device, (m, n, k), strides, aligned(rows, w_gate, w_up), config)
    if plan.kind == "torch":
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            made = torch.mm(rows, w_gate.t()).view(h.shape), torch.mm(rows, w_up.t()).view(h.shape)
        grid = (ceil_div(h.numel(), SIZE),)  # h of the rounded products
        _GATED_DZ(grid, (h, *made, h, h, h), (h.numel(), activation, False, SIZE))
        return (h, *made) if keep else (h, gate, up)
    launch(_LAUNCHERS["gated_linear"], plan, (rows, w_gate, w_up, h, gate, up), (m, n, k, *strides, activation, keep))
    return h, gate, up


def gated_dz(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dgate, dup, h) from the scaled dh and the saved gate and up, all of one shape and dtype.

    dgate = dh * up * act'(gate), dup = dh * act(gate), h = act(gate) * up: in fp32, each rounded once.
    """
    check_activation(activation)
    check_operands("dh, gate and up", dh, gate, up)
    if dh.shape != gate.shape or gate.shape != up.shape:
        raise ValueError(f"dh {tuple(dh.shape)}, gate {tuple(gate.shape)} and up {tuple(up.shape)} differ in shape")
    dh, gate, up = dh.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup, h = torch.empty_like(dh), torch.empty_like(dh), torch.empty_like(dh)
    if dh.numel():
        grid = (ceil_div(dh.numel(), SIZE),)
        _GATED_DZ(grid, (dh, gate, up, dgate, dup, h), (dh.numel(), activation, True, SIZE))
    return dgate, dup, h


def gated_dh(
    dy: Tensor, w_down: Tensor, gate: Tensor, up: Tensor, activation: str, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``gated_dz`` of dh = dy @ w_down, in the epilogue of that product: dh is neither stored nor rounded.

    Args:
        dy: [..., M], the scaled gradient of the block's result.
        w_down: [M, N], dy's dtype.
        gate, up: [..., N], saved by the forward.
        activation: as in ``gated_linear``.
        config: instead of the table's.

    Returns:
        (dgate, dup, h), each [..., N], contiguous.
    """
    check_activation(activation)
    check_operands("dy, w_down, gate and up", dy, w_down, gate, up)
    fits = w_down.dim() == 2 and dy.shape[-1] == w_down.shape[0] and gate.shape == up.shape
    if not fits or gate.shape != (*dy.shape[:-1], w_down.shape[1]):
        raise ValueError(
            f"dy {tuple(dy.shape)}, w_down {tuple(w_down.shape)}, gate {tuple(gate.shape)} and up {tuple(up.shape)} do "
            "not fit: need [..., M], [M, N], [..., N] and [..., N]"
        )
    rows, n = rows_of(dy), w_down.shape[1]
    m, k = rows.shape
    strides = (*rows.stride(), *w_down.stride())
    plan = plan_of("gated_dh", dy.dtype, dy.device, (m, n, k), strides, aligned(rows, w_down), config)
    if plan.kind == "torch":
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            dh = torch.mm(rows, w_down).view(gate.shape)
        return gated_dz(dh, gate, up, activation)
    gate, up = gate.contiguous(), up.contiguous()
    dgate, dup, h = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    if h.numel():
        launch(_LAUNCHERS["gated_dh"], plan, (rows, w_down, gate, up, dgate, dup, h), (m, n, k, *strides, activation))
    return dgate, dup, h


def gated_dx(dgate: Tensor, dup: Tensor, w_gate: Tensor, w_up: Tensor, config: Config | None = None) -> Tensor:
    """Compute dx = dgate @ w_gate + dup @ w_up in one fp32 accumulation, rounded once.

    Args:
        dgate, dup: [..., N], still scaled.
        w_gate, w_up: [N, K].

    Returns:
        [..., K], contiguous.
    """
    check_operands("dgate, dup, w_gate and w_up", dgate, dup, w_gate, w_up)
    _check_weights(w_gate, w_up)
    if dgate.shape != dup.shape or dgate.shape[-1] != w_gate.shape[0]:
        raise ValueError(
            f"dgate {tuple(dgate.shape)}, dup {tuple(dup.shape)} and w_gate {tuple(w_gate.shape)} do not fit: need "
            "[..., N], [..., N] and [N, K]"
        )
    first, second = rows_of(dgate), rows_of(dup)
    (m, k), n = first.shape, w_gate.shape[1]
    dx = torch.empty((*dgate.shape[:-1], n), dtype=dgate.dtype, device=dgate.device)
    if dx.numel() == 0:
        return dx
    strides = (*first.stride(), *second.stride(), *w_gate.stride(), *w_up.stride())
    begins = aligned(first, second, w_gate, w_up)
    plan = plan_of("gated_dx", dgate.dtype, dgate.device, (m, n, k), strides, begins, config)
    if plan.kind == "torch":
        for part in row_parts(m, n):
            total = wide_product(first[part], w_gate)
            dx.view(m, n)[part] = total.add_(wide_product(second[part], w_up))
        return dx
    launch(_LAUNCHERS["gated_dx"], plan, (first, second, w_gate, w_up, dx), (m, n, k, *strides))
    return dx
