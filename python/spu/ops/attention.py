"""``attention``: softmax(scale * q @ k.T) @ v for 16-bit tensors, accumulated in fp32, without the matrix of scores.

On a CPU the kernels are this library's own: plain torch's fp16 attention is scalar there. Elsewhere torch's own are
called; on Hopper cuDNN's come first, since those that torch prefers were written for Ampere. The backward recomputes
the weights from the saved log-sum-exp (Dao et al., arXiv:2205.14135).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spu.common.dtypes import HALVES
from spu.ops import schema
from spu.ops.autograd import Eager, FusedOp, without_gradient
from spu.ops.dispatch import choose_backend
from spu.ops.plain import fake, takes
from spu.ops.reference.linear import exact, wide

__all__ = ["attention", "preferred_kernels", "unshared_heads"]

_HOPPER = 9
_ORDER = threading.Lock()  # torch keeps one order for the whole process: it is changed for one call at a time


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], given: Sequence[Any]) -> None:
    *qkv, scale, causal = inputs
    ctx.save_for_backward(*qkv, *outputs)
    ctx.scale, ctx.causal = scale, causal


def _gradients(ctx: Any, dout: Tensor, backend: str) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k and v."""
    backward = schema.overload("attention_backward", backend)
    return backward(dout, *ctx.saved_tensors, ctx.scale, ctx.causal)  # type: ignore[no-any-return]


_ATTENTION = FusedOp("attention", "attention", 3, _save, _gradients)


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    fits = (
        q.dim() == k.dim() == 4
        and k.shape == v.shape
        and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
        and (k.shape[1] > 0 or q.shape[1] == 0)
        and k.shape[2] > 0
        and q.shape[2] % k.shape[2] == 0
    )
    if not fits:
        raise ValueError(
            f"attention: {shapes} do not fit: they must be [batch, tokens, heads, head_dim], k and v alike, with a "
            "number of heads that divides q's"
        )
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"attention: {shapes}: causal needs as many keys as queries; pass causal=False or pad")
    if not scale > 0:
        raise ValueError(f"attention: scale is {scale}: it must be positive")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise TypeError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}: convert them to one with .to()")
    if not q.device == k.device == v.device:
        raise ValueError(f"attention: q is on {q.device}, k on {k.device}, v on {v.device}: move them with .to()")


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False) -> Tensor:
    """Compute softmax(scale * q @ k.T) @ v for every head.

    Args:
        q: [batch, tokens, heads, head_dim]; fp16, bf16 or fp32, strides as they are.
        k, v: [batch, keys, kv_heads, head_dim], kv_heads a divisor of heads (query heads share them in order).
        scale: of the scores, positive; default: head_dim ** -0.5.
        causal: a query sees the keys up to its own position; needs keys == tokens.

    Returns:
        [batch, tokens, heads, head_dim] in q's dtype. Differentiable once. The backward keeps q, k, v, the result and
        4 bytes per head and token. On the CPU sums are fp32 and results are rounded once, the same for any number of
        threads; on other devices this is torch's ``scaled_dot_product_attention``.

    Raises:
        ValueError: shapes, devices or a scale that do not fit.
        TypeError: dtypes that differ.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    _check(q, k, v, scale, causal)
    if choose_backend(q) == "cpu" and takes(q, k, v):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return without_gradient("attention", "cpu", q, k, v, scale, causal)[0]  # type: ignore[no-any-return]
        return Eager.apply(q, k, v, _ATTENTION, "cpu", (scale, causal), ())
    return _torch_attention(q, k, v, scale, causal)  # type: ignore[no-any-return]


def preferred_kernels(q: Tensor) -> AbstractContextManager[None]:
    """Return a context for one call of torch's attention, in which cuDNN's kernels come first where they are best.

    That is on GPUs of compute capability 9, in 16 bits, for eager code. The others follow where cuDNN does not serve. A
    user's switches stay in force: what is off stays off.
    """
    eager = not torch.compiler.is_compiling()
    if eager and q.is_cuda and q.dtype in HALVES and torch.backends.cuda.cudnn_sdp_enabled() and _is_hopper(q.device):
        return _cudnn_first()
    return nullcontext()


def unshared_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return k and v [batch, heads, keys, head_dim], q's heads first too, for a call of torch's attention without a
    mask: with a head for each of q's where torch's flash kernels do not serve 16-bit tensors of a GPU.

    Its next ones, which need no matrix of scores either, take no shared heads (torch 2.11 to 2.13). So torch would make
    that matrix, in fp32: for every model with shared heads on GPUs before Ampere.
    """
    groups = q.shape[1] // max(1, k.shape[1])
    if groups < 2 or not q.is_cuda or q.dtype not in HALVES or torch.compiler.is_compiling() or fake(q, k, v):
        return k, v
    if _has_flash(q, k, v):
        return k, v
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def _has_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    asked = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, True)
    return bool(torch.backends.cuda.can_use_flash_attention(asked))


@lru_cache(maxsize=64)
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == _HOPPER


@contextmanager
def _cudnn_first() -> Iterator[None]:
    switches = torch.backends.cuda
    with _ORDER:
        on = [SDPBackend.CUDNN_ATTENTION]
        on += [SDPBackend.FLASH_ATTENTION] if switches.flash_sdp_enabled() else []
        on += [SDPBackend.EFFICIENT_ATTENTION] if switches.mem_efficient_sdp_enabled() else []
        on += [SDPBackend.MATH] if switches.math_sdp_enabled() else []
        with sdpa_kernel(on, set_priority=True):
            yield


@exact
def _torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    # Torch's own kernels: on a CPU those for fp32, its 16-bit ones are slower and round more.
    query, key, value = ((wide(x) if q.device.type == "cpu" else x).transpose(1, 2) for x in (q, k, v))
    key, value = unshared_heads(query, key, value)
    with preferred_kernels(query):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).to(q.dtype)
