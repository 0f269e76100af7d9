"""``rotary``: rotary positions for queries and keys in one pass, and back.

For the pairs (x1, x2) of a head, its two halves or its neighbours, (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2) in fp32,
rounded once; the backward is the transpose. Angles may be fp32 beside 16-bit heads. Su et al., arXiv:2104.09864.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spu.common.torch_private import BelowAutograd
from spu.ops import schema
from spu.ops.autograd import Function, without_gradient
from spu.ops.dispatch import DTYPES, choose_backend
from spu.ops.plain import refuse_derivatives_of_backward, takes
from spu.ops.reference.norm import rotated

__all__ = ["rotary", "torch_rotary"]


class _Rotary(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.how = interleaved, backend
        with BelowAutograd():
            return schema.overload("rotary", backend)(q, k, cos, sin, interleaved, False)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_derivatives_of_backward("rotary", dq)
        cos, sin = ctx.saved_tensors
        interleaved, backend = ctx.how
        return *schema.overload("rotary", backend)(dq, dk, cos, sin, interleaved, True), None, None, None, None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by their positions.

    Args:
        q: [batch, heads, tokens, head_dim] of any strides; fp16, bf16, fp32 (fp64 on the reference backend).
        k: the same, with heads of its own.
        cos, sin: [batch or 1, tokens, head_dim], of the same dtype or both fp32, without a gradient.
        interleaved: pairs are neighbours, not elements half a head apart.

    Returns:
        q and k turned, of their dtype and layout. Differentiable once in both. Torch's own ops serve what
        ``linear_act`` leaves to them, and ``torch.compile``.

    Raises:
        ValueError: shapes or devices that do not fit, an odd head_dim, cos or sin with a gradient.
        TypeError: dtypes that differ or are not supported.
    """
    _check(q, k, cos, sin)
    if not takes(q, k, cos, sin) or torch.compiler.is_compiling():
        return torch_rotary(q, k, cos, sin, interleaved)
    backend = choose_backend(q)
    if not torch.is_grad_enabled():
        return without_gradient("rotary", backend, q, k, cos, sin, interleaved, False)  # type: ignore[no-any-return]
    return _Rotary.apply(q, k, cos, sin, interleaved, backend)  # type: ignore[no-any-return]


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    fits = (
        q.dim() == k.dim() == 4
        and cos.dim() == 3
        and cos.shape == sin.shape
        and q.shape[0] == k.shape[0]
        and q.shape[2:] == k.shape[2:] == cos.shape[1:]
        and cos.shape[0] in (1, q.shape[0])
        and q.shape[3] % 2 == 0
    )
    if not fits:
        raise ValueError(
            f"rotary: q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not "
            "fit: they must be [batch, heads, tokens, head_dim] and [batch or 1, tokens, head_dim], head_dim even"
        )
    of_angles = q.dtype, torch.float32
    if q.dtype != k.dtype or cos.dtype != sin.dtype or cos.dtype not in of_angles or q.dtype not in DTYPES["reference"]:
        raise TypeError(
            f"rotary: q is {q.dtype}, k {k.dtype}, cos {cos.dtype} and sin {sin.dtype}: all must be one of float16, "
            "bfloat16 and float32 (cos and sin: or float32); convert them with .to()"
        )
    if not q.device == k.device == cos.device == sin.device:
        raise ValueError(f"rotary: q is on {q.device}, k on {k.device}, cos on {cos.device}, sin on {sin.device}")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("rotary: cos or sin has a gradient, which is not computed: detach it, or use torch's own ops")


def torch_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Compute the same by torch's own ops, which round after each; in fp32, then once, where cos and sin are fp32."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned_q, turned_k = ((x * cos + rotated(x, interleaved) * sin).to(x.dtype) for x in (q, k))
    return turned_q, turned_k
