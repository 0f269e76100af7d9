"""An embedding's gradient, added to the rows that were looked up; rotary positions (Su et al., arXiv:2104.09864)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spu.kernels.arith import narrow, widen
from spu.kernels.kept import Launcher
from spu.kernels.launch import POINTWISE, ceil_div, check_operands, check_sink, rows_of
from spu.kernels.tiles import write_main_grad

_COLUMNS = 512


@triton.jit
def sum_rows_kernel(
    dy, ids, order, main_grad, inv_scale, found_inf, count, cols, padding_idx,
    ACCUMULATE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Add the rows of dy that have one id, in their order, to that id's row of main_grad.

    ids int64 [count] are sorted, order int64 [count] says where each comes from. The program at the first place of an
    id does its work; the others end at once.
    """
    first = tl.program_id(0)
    col = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = col < cols
    entry = tl.load(ids + first)
    before = tl.load(ids + first - 1, mask=first > 0, other=-1)
    if (entry != before) & (entry != padding_idx):
        total = tl.zeros((SIZE,), tl.float32)
        place = first
        while tl.load(ids + place, mask=place < count, other=-1) == entry:
            row = tl.load(order + place)
            total += widen(tl.load(dy + row * cols + col, mask=inside, other=0.0))
            place += 1
        write_main_grad(total, main_grad, inv_scale, found_inf, entry * cols + col, inside, ACCUMULATE)


@triton.jit
def _pairs(pointer, inside, half, ROWS: tl.constexpr, SIZE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return both [ROWS, SIZE] of the pairs that ``pointer`` begins: neighbours, which are loaded together, or half a
    head apart.
    """
    if INTERLEAVED:
        both = tl.arange(0, 2 * SIZE)[None, :]
        values = widen(tl.load(pointer + both, mask=inside & (both < 2 * half), other=0.0))
        return tl.split(tl.reshape(values, (ROWS, SIZE, 2)))
    else:
        pair = tl.arange(0, SIZE)[None, :]
        first = widen(tl.load(pointer + pair, mask=inside & (pair < half), other=0.0))
        return first, widen(tl.load(pointer + pair + half, mask=inside & (pair < half), other=0.0))


@triton.jit
def _turn(
    x, out, cos, sin, heads, half, stride, out_stride,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Turn the heads of one token; cos and sin point to its row."""
    head = tl.arange(0, HEADS)[:, None]
    x += head.to(tl.int64) * stride
    out += head.to(tl.int64) * out_stride
    x1, x2 = _pairs(x, head < heads, half, HEADS, SIZE, INTERLEAVED)
    c1, c2 = _pairs(cos, True, half, 1, SIZE, INTERLEAVED)
    s1, s2 = _pairs(sin, True, half, 1, SIZE, INTERLEAVED)
    y1 = x1 * c1 + x2 * s2 if INVERSE else x1 * c1 - x2 * s1
    y2 = x2 * c2 - x1 * s1 if INVERSE else x2 * c2 + x1 * s2
    pair, both = tl.arange(0, SIZE)[None, :], tl.arange(0, 2 * SIZE)[None, :]
    if INTERLEAVED:
        turned = narrow(tl.interleave(y1, y2), out.dtype.element_ty)
        tl.store(out + both, turned, mask=(head < heads) & (both < 2 * half))
    else:
        inside = (head < heads) & (pair < half)
        tl.store(out + pair, narrow(y1, out.dtype.element_ty), mask=inside)
        tl.store(out + pair + half, narrow(y2, out.dtype.element_ty), mask=inside)


@triton.jit
def rotary_kernel(
    q, k, q_out, k_out, cos, sin, tokens, half, q_heads, k_heads, cos_batch,
    q_b, q_h, q_t, k_b, k_h, k_t, qo_b, qo_h, qo_t, ko_b, ko_h, ko_t,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Turn all heads of one token of q and k [batch, heads, tokens, 2 * half], given by strides."""
    batch, token = (tl.program_id(0) // tokens).to(tl.int64), (tl.program_id(0) % tokens).to(tl.int64)
    row = batch * cos_batch + token * 2 * half
    _turn(
        q + batch * q_b + token * q_t, q_out + batch * qo_b + token * qo_t, cos + row, sin + row, q_heads, half,
        q_h, qo_h, INTERLEAVED, INVERSE, Q_HEADS, SIZE,
    )  # fmt: skip
    _turn(
        k + batch * k_b + token * k_t, k_out + batch * ko_b + token * ko_t, cos + row, sin + row, k_heads, half,
        k_h, ko_h, INTERLEAVED, INVERSE, K_HEADS, SIZE,
    )  # fmt: skip


_SUM_ROWS, _ROTARY = Launcher(sum_rows_kernel, POINTWISE), Launcher(rotary_kernel, POINTWISE)


def embedding_dw_(
    dy: Tensor, ids: Tensor, padding_idx: int, main_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, accumulate: bool
) -> None:
    """Compute main_grad [V, C] (+)= inv_scale * the sum, for each entry, of the rows of dy [..., C] with its id.

    Args:
        dy: fp16, bf16 or fp32, any strides, still scaled.
        ids: int64 [...], in [0, V).
        padding_idx: an entry whose rows are left out; -1: none.
        main_grad, inv_scale, found_inf, accumulate: as in ``linear_dw_``.

    Raises:
        ValueError: shapes that do not fit, a main_grad that is not contiguous.
    """
    rows = rows_of(dy).contiguous()
    count, cols = rows.shape
    if main_grad.dim() != 2 or main_grad.shape[1] != cols or ids.numel() != count:
        raise ValueError(f"dy {tuple(dy.shape)}, ids {tuple(ids.shape)} and main_grad {tuple(main_grad.shape)} differ")
    check_sink(main_grad, inv_scale, found_inf, tuple(main_grad.shape), dy)
    if not accumulate:
        main_grad.zero_()
    if not count or not cols:
        return
    in_order, order = torch.sort(ids.reshape(-1), stable=True)
    size = min(_COLUMNS, triton.next_power_of_2(cols))
    _SUM_ROWS(
        (count, ceil_div(cols, size)),
        (rows, in_order, order, main_grad, inv_scale, found_inf),
        (count, cols, padding_idx, accumulate, size),
    )


def _with_result(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x and memory for its result, in the layout of x where that has no gaps; heads lie dense in both."""
    if x.stride(3) == 1:
        out = torch.empty_like(x)
        if out.stride(3) == 1:  # beside strides of 0 or 1 torch may put another dimension last
            return x, out
    x = x.contiguous()
    return x, torch.empty(x.shape, dtype=x.dtype, device=x.device)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by their positions; ``inverse``: by the transpose. See ``spu.ops.rotary``.

    Args:
        q, k: [batch, heads, tokens, head_dim] of any strides, heads of their own; fp16, bf16 or fp32.
        cos, sin: [batch or 1, tokens, head_dim] of the same dtype, or both fp32.

    Raises:
        ValueError: shapes that do not fit, mixed dtypes or devices.
        TypeError: another dtype.
    """
    check_operands("q and k", q, k)
    check_operands("cos and sin", cos, sin)
    if cos.dtype != torch.float32 or cos.device != q.device:
        check_operands("q, k, cos and sin", q, cos)
    batch, _, tokens, head_dim = q.shape
    if q.shape[2:] != k.shape[2:] or cos.shape != sin.shape or cos.shape[1:] != q.shape[2:] or head_dim % 2:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and cos {tuple(cos.shape)} do not fit")
    (q, q_out), (k, k_out) = _with_result(q), _with_result(k)
    cos, sin = cos.contiguous(), sin.contiguous()
    if q.numel() + k.numel():
        half = head_dim // 2
        strides = [stride for x in (q, k, q_out, k_out) for stride in x.stride()[:3]]
        heads = tuple(triton.next_power_of_2(max(1, x.shape[1])) for x in (q, k))
        _ROTARY(
            (batch * tokens,),
            (q, k, q_out, k_out, cos, sin),
            (
                tokens, half, q.shape[1], k.shape[1], 0 if cos.shape[0] == 1 else tokens * head_dim, *strides,
                interleaved, inverse, *heads, triton.next_power_of_2(half),
            ),
        )  # fmt: skip
    return q_out, k_out
