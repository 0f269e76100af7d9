"""Cross-entropy of a vocabulary projection whose logits never exist whole.

Forward: every program walks over a share of the vocabulary's tiles with an online log-sum-exp (Milakov and Gimelshein,
arXiv:1805.02867) and leaves (maximum, sum, target's logit) for each of its rows; a second kernel combines the shares in
order. Backward: the logits' gradient, tile by tile from the kept log-sum-exp. Where cuBLAS makes the product, the same
is done on its logits for a bounded number of rows. Where loss and gradient are asked for at once, the forward keeps its
logits, in fp32, and the gradient is made from them instead of a second product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
from spu.kernels.logits import (
    combine_ce_kernel,
    linear_ce_dz_kernel,
    linear_ce_kernel,
    logits_ce_kernel,
    logits_dz_kernel,
)
from spu.kernels.table import follows_tables

_ROWS = 64  # of the combining kernel
_COLUMNS = 1024  # of the kernels on whole rows of logits
_CHUNK_BYTES = 256 << 20  # of logits at a time, where cuBLAS makes them
_SHARES_PER_PROCESSOR = 4
_INT32 = 2**31 - 1
_POINTER_COLUMNS, _KEPT_COLUMNS = 128, 64  # of tiles that are loaded by address; of those that are stored, too


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
    keep: bool = False,
) -> Plan:
    """Return the launches of one shape; ``keep``: the logits are stored as well."""
    rows, v, k = shape
    config = override or for_alignment(config_for("linear_ce", dtype, device, shape), dtype, (*strides, shape[1]))
    described = config.kind == "descriptor" and k > 0 and can_describe(dtype, strides, aligned)
    if config.kind == "descriptor" and not described:
        config = dataclasses.replace(config, kind="tile", block_n=min(config.block_n, _POINTER_COLUMNS), blocks=1)
    if keep and not described:  # beside the addresses of its loads, those of the stores do not fit
        config = dataclasses.replace(config, block_n=min(config.block_n, _KEPT_COLUMNS))
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
    _online(hidden, weight, target, None, loss, lse, ignore_index, plan)
    return loss, lse


def _online(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    logits: Tensor | None,
    loss: Tensor,
    lse: Tensor,
    ignore_index: int,
    plan: Plan,
) -> None:
    """Compute loss and lse, and the logits where there is room for them."""
    (rows, k), v = hidden.shape, weight.shape[0]
    parts = torch.empty(3, plan.shares, rows, dtype=torch.float32, device=hidden.device)
    with _descriptors(plan):
        variable = hidden, weight, target, parts, parts if logits is None else logits
        fixed = rows, v, k, *hidden.stride(), *weight.stride(), plan.tiles_each, logits is not None
        _LINEAR_CE((plan.row_tiles, plan.shares), variable, fixed, plan.constants)
    _COMBINE((ceil_div(rows, _ROWS),), (parts, target, loss, lse), (rows, v, plan.shares, ignore_index, _ROWS))


def _dz_of_logits(logits: Tensor, dz: Tensor, target: Tensor, lse: Tensor, grad_rows: Tensor, ignore: int) -> None:
    grid = (logits.shape[0], ceil_div(logits.shape[1], _COLUMNS))
    _LOGITS_DZ(grid, (logits, dz, target, lse, grad_rows), (logits.shape[1], ignore, _COLUMNS))


def linear_ce_and_dz(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    grad_rows: Tensor,
    logits: Tensor,
    ignore_index: int,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (loss of ``linear_ce``, dz of ``linear_ce_dz``) from logits that are made once.

    ``logits`` is memory for them: fp32 [R, V], contiguous. Those of cuBLAS have the storage dtype, and lie in dz's.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    _check(hidden, weight, target)
    (rows, k), v = hidden.shape, weight.shape[0]
    loss, lse = (torch.empty(rows, dtype=torch.float32, device=hidden.device) for _ in range(2))
    if logits.shape != (rows, v) or logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous float32 [{rows}, {v}], not {logits.dtype} {tuple(logits.shape)}")
    dz = torch.empty(rows, v, dtype=hidden.dtype, device=hidden.device)
    if rows == 0 or v == 0:
        return loss.zero_(), dz
    target, grad_rows = target.contiguous(), grad_rows.contiguous()
    strides = (*hidden.stride(), *weight.stride())
    plan = _plan(hidden.dtype, hidden.device, (rows, v, k), strides, _aligned(hidden, weight), config, keep=True)
    if plan.kind == "torch":
        logits = dz
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            torch.mm(hidden, weight.t(), out=dz)
        _LOGITS_CE((rows,), (dz, target, loss, lse), (v, ignore_index, _COLUMNS))
    else:
        _online(hidden, weight, target, logits, loss, lse, ignore_index, plan)
    _dz_of_logits(logits, dz, target, lse, grad_rows, ignore_index)
    return loss, dz


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
        _dz_of_logits(dz, dz, target, lse, grad_rows, ignore_index)
        return dz
    dz = torch.empty(rows, v, dtype=hidden.dtype, device=hidden.device)
    with _descriptors(plan):
        variable = hidden, weight, target, lse, grad_rows, dz
        _LINEAR_CE_DZ((plan.programs,), variable, (rows, v, k, *strides, ignore_index), plan.dz_constants)
    return dz
