"""AdamW and the gradient norm over lists of tensors, one launch for all of them.

The kernels find their tensors through a table of addresses on the device, and their share of work through a table of
(tensor, block). Both are kept: in training lists of the same sizes come at every step, mostly at the same addresses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spu.kernels.arith import narrow, widen
from spu.kernels.kept import Launcher
from spu.kernels.launch import POINTWISE, capturing, ceil_div, keep_for_graphs

SIZE = 1024
TILES = 8  # of SIZE elements a program: the step's scalars are worked out once for them
_ALIGN_BYTES = 16
_PARTS = 4096  # shares that the last program of a norm adds up at a time
_FIELDS = 6  # target, grad, exp_avg, exp_avg_sq, step, 16-bit copy


@triton.jit
def _one_minus_power(count, log_beta):
    """Return 1 - beta^count to fp32 accuracy: by its series near 0, where the difference would cancel."""
    x = count * log_beta
    series = 1.0 + x * (1 / 5) * (1.0 + x * (1 / 6) * (1.0 + x * (1 / 7) * (1.0 + x * (1 / 8))))
    series = -x * (1.0 + x * (1 / 2) * (1.0 + x * (1 / 3) * (1.0 + x * (1 / 4) * series)))
    return tl.where(x > -0.25, series, 1.0 - tl.exp(x))


@triton.jit
def _address(table, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _load(pointer, inside, WHOLE: tl.constexpr):
    """Return a tile; without a mask, whose elements nobody knows to be alike, loads and stores are of 16 bytes."""
    if WHOLE:
        return tl.load(pointer)
    return tl.load(pointer, mask=inside, other=0.0)


@triton.jit
def _store(pointer, value, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointer, value)
    else:
        tl.store(pointer, value, mask=inside)


@triton.jit
def _update(
    target, grad, average, square, copy, first, numel, scale, step_size, root, keep, beta1_left, beta2, beta2_left,
    eps, COPY: tl.constexpr, COPIES: tl.constexpr, WHOLE: tl.constexpr, SIZE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Update the TILES * SIZE elements from ``first`` on; WHOLE: all of them are there."""
    for tile in range(TILES):
        at = first + tile * SIZE + tl.arange(0, SIZE)
        inside = at < numel
        g = _load(grad + at, inside, WHOLE) * scale
        m = _load(average + at, inside, WHOLE)
        v = _load(square + at, inside, WHOLE)
        w = _load(target + at, inside, WHOLE)
        if COPIES:  # a weight that is no longer what its master rounds to was changed by somebody: it is taken
            weight = widen(_load(copy + at, inside, WHOLE))
            w = tl.where(widen(narrow(w, COPY)) == weight, w, weight)
        w = w * keep
        m = m + beta1_left * (g - m)
        v = v * beta2 + beta2_left * (g * g)
        below = tl.math.div_rn(tl.math.sqrt_rn(v), root + tl.zeros((SIZE,), tl.float32)) + eps
        w = w - step_size * tl.math.div_rn(m, below)
        _store(average + at, m, inside, WHOLE)
        _store(square + at, v, inside, WHOLE)
        _store(target + at, w, inside, WHOLE)
        if COPIES:
            _store(copy + at, narrow(w, COPY), inside, WHOLE)


@triton.jit
def adamw_kernel(
    addresses, numels, blocks, grad_scale, found_inf, lr, keep, beta1_left, beta2, beta2_left, eps,
    log_beta1, log_beta2, COPY: tl.constexpr, COPIES: tl.constexpr, ALIGNED: tl.constexpr, FIELDS: tl.constexpr,
    SIZE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Do one AdamW step (arXiv:1711.05101) in torch's order of operations; nothing where found_inf is set.

    keep = 1 - lr * weight_decay, beta_left = 1 - beta. addresses int64 [tensors, FIELDS], numels int64 [tensors],
    blocks int32 [programs, 2]. With COPIES the result is also stored as COPY, the parameters' 16-bit type.
    """
    if tl.load(found_inf) == 0.0:
        which = tl.load(blocks + 2 * tl.program_id(0))
        first = tl.load(blocks + 2 * tl.program_id(0) + 1).to(tl.int64) * (SIZE * TILES)
        row = addresses + which * FIELDS
        target, grad = _address(row, tl.float32, ALIGNED), _address(row + 1, tl.float32, ALIGNED)
        average, square = _address(row + 2, tl.float32, ALIGNED), _address(row + 3, tl.float32, ALIGNED)
        count = tl.load(_address(row + 4, tl.float32, False))
        copy = _address(row + 5, COPY, ALIGNED)
        numel = tl.load(numels + which)
        step_size = tl.math.div_rn(lr, _one_minus_power(count, log_beta1))
        root = tl.math.sqrt_rn(_one_minus_power(count, log_beta2))
        scale = tl.load(grad_scale)
        if first + SIZE * TILES <= numel:
            _update(
                target, grad, average, square, copy, first, numel, scale, step_size, root, keep, beta1_left, beta2,
                beta2_left, eps, COPY, COPIES, True, SIZE, TILES,
            )  # fmt: skip
        else:
            _update(
                target, grad, average, square, copy, first, numel, scale, step_size, root, keep, beta1_left, beta2,
                beta2_left, eps, COPY, COPIES, False, SIZE, TILES,
            )  # fmt: skip


@triton.jit
def _squares(grad, first, numel, WHOLE: tl.constexpr, SIZE: tl.constexpr, TILES: tl.constexpr):
    """Return fp64 [SIZE]: sums of squares of the TILES * SIZE elements from ``first`` on."""
    total = tl.zeros((SIZE,), tl.float64)
    for tile in range(TILES):
        at = first + tile * SIZE + tl.arange(0, SIZE)
        g = _load(grad + at, at < numel, WHOLE).to(tl.float64)
        total += g * g
    return total


@triton.jit
def square_sum_kernel(
    addresses, numels, blocks, parts, arrived, out,
    ALIGNED: tl.constexpr, SIZE: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Compute out fp64 [1] = the sum of all squares. In fp32 they overflow from values of 1.8e19 on. Every program
    leaves its share's sum in parts fp64 [programs]. The one that arrives last adds them up in their order, whichever
    program it is, and sets the counter ``arrived`` back to 0.
    """
    which = tl.load(blocks + 2 * tl.program_id(0))
    first = tl.load(blocks + 2 * tl.program_id(0) + 1).to(tl.int64) * (SIZE * TILES)
    grad, numel = _address(addresses + which, tl.float32, ALIGNED), tl.load(numels + which)
    if first + SIZE * TILES <= numel:
        total = _squares(grad, first, numel, True, SIZE, TILES)
    else:
        total = _squares(grad, first, numel, False, SIZE, TILES)
    tl.store(parts + tl.program_id(0), tl.sum(total))
    tl.debug_barrier()  # the store comes before the release of whichever thread counts
    count = tl.num_programs(0)
    if tl.atomic_add(arrived, 1, sem="acq_rel") == count - 1:
        whole = tl.zeros((PARTS,), tl.float64)
        for start in range(0, count, PARTS):
            at = start + tl.arange(0, PARTS)
            whole += tl.load(parts + at, mask=at < count, other=0.0, volatile=True)
        tl.store(out, tl.sum(whole))
        tl.store(arrived, 0)


_ADAMW, _SQUARE_SUM = Launcher(adamw_kernel, POINTWISE), Launcher(square_sum_kernel, POINTWISE)


class _Work(NamedTuple):
    """Of a list of sizes, on the device: sizes int64 [tensors], (tensor, block) int32 [programs, 2]."""

    sizes: Tensor
    blocks: Tensor
    programs: int


class _Where(NamedTuple):
    """Of a list of tensors, on the device: addresses int64 [tensors, fields]; a counter, 0 between launches."""

    addresses: Tensor
    arrived: Tensor


@lru_cache(maxsize=64)
def _work(sizes: tuple[int, ...], device: torch.device, stream: int) -> _Work:
    work = [(i, block) for i, size in enumerate(sizes) for block in range(ceil_div(size, SIZE * TILES))]
    return _Work(_sent(sizes, torch.int64, device), _sent(work, torch.int32, device), len(work))


@lru_cache(maxsize=64)
def _where(addresses: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> _Where:
    return _Where(_sent(addresses, torch.int64, device), torch.zeros(1, dtype=torch.int32, device=device))


def _tables(
    sizes: tuple[int, ...], addresses: tuple[tuple[int, ...], ...], device: torch.device
) -> tuple[_Work, _Where]:
    stream = _stream(device)
    work, where = _work(sizes, device, stream), _where(addresses, device, stream)
    keep_for_graphs(work.sizes, work.blocks, where.addresses, where.arrived)
    return work, where


def _sent(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the values on the device; the host does not wait for the copy, which only its own stream waits for.

    Raises:
        RuntimeError: while a CUDA graph is captured: the table would be filled by its replays alone.
    """
    if capturing(device):
        raise RuntimeError(
            "adamw_ and grad_sqnorm keep a table of these tensors on the device, and it is not there yet: call them "
            "once with the same tensors on this stream before the capture"
        )
    here = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda", device="cpu")
    return here.to(device, non_blocking=True)


def _stream(device: torch.device) -> int:
    """Return the current stream: each has tables of its own, since no other waits for their copies."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _aligned(addresses: tuple[tuple[int, ...], ...], fields: Sequence[int]) -> bool:
    return all(row[field] % _ALIGN_BYTES == 0 for row in addresses for field in fields)


def _dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _copy_back(tensors: Sequence[Tensor], dense: Sequence[Tensor]) -> None:
    for tensor, made in zip(tensors, dense, strict=True):
        if tensor is not made:
            tensor.copy_(made)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    grad_scale: Tensor,
    found_inf: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update every parameter by AdamW in one launch, on the device alone.

    Args:
        params: of one dtype and device; fp16 or bf16 with ``masters``, fp32 without.
        grads, masters, exp_avgs, exp_avg_sqs: fp32, of the parameters' shapes; ``masters`` is empty for fp32 ones.
        steps: fp32 [1] each: the number of this update, from 1.
        grad_scale: fp32 [1], multiplies the gradients.
        found_inf: fp32 [1]; nothing changes where it is not 0.
    """
    if not params:
        return
    targets, averages, squares = _dense(masters or params), _dense(exp_avgs), _dense(exp_avg_sqs)
    gradients, copies = _dense(grads), _dense(params)
    rows = zip(targets, gradients, averages, squares, steps, copies, strict=True)
    addresses = tuple(tuple(tensor.data_ptr() for tensor in row) for row in rows)
    sizes = tuple(param.numel() for param in params)
    if not any(sizes):
        return
    work, where = _tables(sizes, addresses, params[0].device)
    copy: Any = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(params[0].dtype, tl.float32)
    factors = lr, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps, _log(beta1), _log(beta2)
    _ADAMW(
        (work.programs,),
        (where.addresses, work.sizes, work.blocks, grad_scale, found_inf, *map(float, factors)),
        (copy, bool(masters), _aligned(addresses, (0, 1, 2, 3, 5)), _FIELDS, SIZE, TILES),
    )
    _copy_back(exp_avgs, averages)
    _copy_back(exp_avg_sqs, squares)
    _copy_back(masters or params, targets)
    if masters:
        _copy_back(params, copies)


def grad_sqnorm(grads: Sequence[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements: fp64 [1], in one launch, always with the same bits.

    Args:
        grads: fp32, on one device, at least one.
    """
    dense = _dense(grads)
    sizes = tuple(grad.numel() for grad in dense)
    out = torch.empty(1, dtype=torch.float64, device=dense[0].device)
    if not any(sizes):
        return out.zero_()
    addresses = tuple((grad.data_ptr(),) for grad in dense)
    work, where = _tables(sizes, addresses, out.device)
    parts = torch.empty(work.programs, dtype=torch.float64, device=out.device)
    _SQUARE_SUM(
        (work.programs,),
        (where.addresses, work.sizes, work.blocks, parts, where.arrived, out),
        (_aligned(addresses, (0,)), SIZE, TILES, _PARTS),
    )
    return out
