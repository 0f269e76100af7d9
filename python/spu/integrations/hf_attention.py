"""Attention for decoders whose weights are 16-bit, registered with transformers.

Torch's own fp16 attention on a CPU is scalar code and takes two thirds of a training step. Without a mask and dropout
``spu.ops.attention`` serves instead; with them, queries, keys and values are widened to fp32 around torch's kernel,
which only adds precision. On every other device, and for fp32, these functions call transformers' own without touching
a bit.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from spu.ops import attention

SDPA_NAME = "spu"
EAGER_NAME = "spu_eager"
_HALF = (torch.float16, torch.bfloat16)


def _widen(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [t.float() if t is not None and t.dtype in _HALF else t for t in tensors]


def _fused(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    causal: bool | None,
) -> torch.Tensor:
    """``spu.ops.attention`` as transformers calls one: heads first; causal unless told otherwise, or for one token."""
    if causal is None:
        causal = query.shape[2] > 1 and bool(getattr(module, "is_causal", True))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attention(q, k, v, scale=scale, causal=causal)


def sdpa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scaled dot-product attention, accumulated in fp32 for fp16 and bf16 on the CPU.

    Args:
        module: the attention module that calls (transformers reads its head grouping from it).
        query: [batch, heads, tokens, head_dim]
        key: [batch, kv_heads, tokens, head_dim]
        value: [batch, kv_heads, tokens, head_dim]
        attention_mask: bool or float, broadcastable to [batch, heads, tokens, tokens], or None for causal.
        **kwargs: whatever the model passes to transformers' `sdpa_attention_forward`.

    Returns:
        ([batch, tokens, heads, head_dim] in the dtype of `query`, None)
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.device.type != "cpu" or query.dtype not in _HALF:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[arg-type]
    if attention_mask is None and not kwargs.get("dropout") and key.shape == value.shape:
        return _fused(module, query, key, value, kwargs.get("scaling"), kwargs.get("is_causal")), None
    q, k, v, mask = _widen(query, key, value, attention_mask)
    out, weights = sdpa_attention_forward(module, q, k, v, mask, **kwargs)  # type: ignore[arg-type]
    return out.to(query.dtype), weights


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The model's own eager attention (the one with logit softcapping), widened like `sdpa_attention`."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if query.device.type != "cpu" or query.dtype not in _HALF:
        return eager(module, query, key, value, attention_mask, **kwargs)
    q, k, v, mask = _widen(query, key, value, attention_mask)
    out, weights = eager(module, q, k, v, mask, **kwargs)
    return out.to(query.dtype), weights


def register_attention() -> None:
    """Make `attn_implementation="spu"` and `"spu_eager"` known to transformers, with their masks. Idempotent."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

    AttentionInterface.register(SDPA_NAME, sdpa_attention)
    AttentionMaskInterface.register(SDPA_NAME, sdpa_mask)
    AttentionInterface.register(EAGER_NAME, eager_attention)
    AttentionMaskInterface.register(EAGER_NAME, eager_mask)


def use_attention(model: nn.Module) -> None:
    """Switch a transformers model from "sdpa" or "eager" to the widened equivalents, in place.

    Any other choice (flash attention, flex attention) was made by the user for a reason and is left alone.
    """
    register_attention()
    current = model.config._attn_implementation  # type: ignore[union-attr]
    if current == "sdpa":
        model.set_attn_implementation(SDPA_NAME)  # type: ignore[operator]
    elif current == "eager" and all(hasattr(sys.modules[m], "eager_attention_forward") for m in _homes(model)):
        model.set_attn_implementation(EAGER_NAME)  # type: ignore[operator]


def _homes(model: nn.Module) -> set[str]:
    """Names of the Python modules that define the model's attention classes."""
    return {type(m).__module__ for m in model.modules() if type(m).__name__.endswith("Attention")}
