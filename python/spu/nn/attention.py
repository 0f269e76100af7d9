"""Attention for decoders whose weights are 16-bit, registered with transformers.

Rows that hold several documents, or one with padding behind it, and whose mask tells no more than that, are computed
document by document, as each would be by itself: in every dtype and on every device.

Torch's own fp16 attention on a CPU is scalar code and takes two thirds of a training step. Without a mask and dropout
``spu.ops.attention`` serves instead; with them, queries, keys and values are widened to fp32 around torch's kernel,
which only adds precision. On every other device, for fp32, for tensors that are not plain ones, and with a keyword that
is not known here (a position bias, sinks), these functions call transformers' own without touching a bit; on a GPU with
the order of torch's kernels, and without shared heads, where only these keep it from slow ones (``ops.attention``).
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from spu.common.dtypes import HALVES
from spu.common.known import Known
from spu.nn.documents import by_documents, document_lengths
from spu.ops import attention
from spu.ops.attention import preferred_kernels, unshared_heads
from spu.ops.plain import fake, takes
from spu.ops.reference.linear import exact

__all__ = [
    "EAGER_NAME",
    "SDPA_NAME",
    "UNREAD",
    "eager_attention",
    "register_attention",
    "restore_attention",
    "sdpa_attention",
    "use_attention",
]

SDPA_NAME = "spu"
EAGER_NAME = "spu_eager"
_OURS = {"sdpa": SDPA_NAME, "eager": EAGER_NAME}
_READ = frozenset(("scaling", "dropout", "is_causal"))  # keywords that are served here
# Keywords that reach an attention but speak of the mask, which is made by then, or of other parts of the model.
UNREAD = frozenset((
    "sliding_window", "position_ids", "cache_position", "use_cache", "cu_seq_lens_q", "cu_seq_lens_k",
    "max_length_q", "max_length_k", "num_items_in_batch", "encoder_hidden_states", "output_attentions",
    "output_hidden_states", "output_router_logits", "logits_to_keep", "return_dict",
))  # fmt: skip


def _serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keywords: dict[str, Any], known: frozenset[str]) -> bool:
    """Tell whether this is a call that is known here in every detail, in 16 bits on a CPU."""
    return q.device.type == "cpu" and q.dtype in HALVES and _knows(q, k, v, keywords, known)


def _knows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keywords: dict[str, Any], known: frozenset[str]) -> bool:
    if not q.dtype == k.dtype == v.dtype or not all(x in known or keywords[x] is None for x in keywords):
        return False
    return takes(q, k, v)


def _fused(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keywords: dict[str, Any]
) -> torch.Tensor | None:
    """Call ``spu.ops.attention`` as transformers calls one without a mask: heads first. None where it does not fit.

    Causal unless told otherwise, or for one query. An empty static cache has more keys than there are causal queries:
    those behind them are not seen.
    """
    causal, scale = keywords.get("is_causal"), keywords.get("scaling")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal) and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    fits = (
        not keywords.get("dropout")
        and query.dim() == key.dim() == 4
        and key.shape == value.shape
        and (query.shape[0], query.shape[3]) == (key.shape[0], key.shape[3])
        and key.shape[1] > 0
        and query.shape[1] % key.shape[1] == 0
        and (not causal or key.shape[2] == query.shape[2])
        and key.shape[2] > 0
        and (scale is None or (isinstance(scale, float) and scale > 0))
    )
    if not fits:
        return None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attention(q, k, v, scale=scale, causal=causal)


def _apart(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    keywords: dict[str, Any],
) -> torch.Tensor | None:
    """Call ``sdpa_attention`` for each document of rows that hold several, or one and padding. None for other masks,
    and with dropout.
    """
    if torch.compiler.is_compiling() or not takes(mask) or not query.dim() == key.dim() == value.dim() == 4:
        return None
    if query.shape[2] < 2 or not query.shape[2] == key.shape[2] == value.shape[2] or query.shape[0] != mask.shape[0]:
        return None
    if keywords.get("dropout") or not getattr(module, "is_causal", True):
        return None
    if mask.shape[-1] != key.shape[2] or not _knows(query, key, value, keywords, _READ | UNREAD):
        return None
    lengths = document_lengths(mask, query.shape[1] * query.shape[3])
    if lengths is None:
        return None

    def unmasked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        return sdpa_attention(module, q, k, v, None, **keywords | {"is_causal": causal})[0]

    return by_documents(query, key, value, lengths, unmasked)


@exact
def _widened(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    function: Callable[..., Any],
    module: nn.Module,
    keywords: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if mask is not None and mask.dtype in HALVES:
        # The lowest number hides a key; beside fp32 scores, 16 bits' lowest would leave the order of hidden ones.
        hidden = mask == torch.finfo(mask.dtype).min
        mask = mask.float().masked_fill(hidden, torch.finfo(torch.float32).min)
    out, weights = function(module, query.float(), key.float(), value.float(), mask, **keywords)
    return out.to(query.dtype), weights


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what torch makes of a bool mask on a CPU, once for all layers: it would keep another for each of them, of
    four times the memory, until their backward.
    """
    if mask.dtype != torch.bool or mask.device.type != "cpu" or torch.compiler.is_compiling():
        return mask
    if mask.is_inference() or not takes(mask) or fake(mask):
        return mask
    return _added(mask, dtype)


@Known
def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():  # a training may meet the mask of an evaluation
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), -torch.inf)


def sdpa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute scaled dot-product attention, accumulated in fp32 for fp16 and bf16 on the CPU.

    Args:
        module: the attention module that calls (transformers reads its head grouping from it).
        query: [batch, heads, tokens, head_dim]
        key: [batch, kv_heads, tokens, head_dim]
        value: [batch, kv_heads, tokens, head_dim]
        attention_mask: bool or float, broadcastable to [batch, heads, tokens, tokens], or None for causal.
        **kwargs: whatever the model passes to transformers' ``sdpa_attention_forward``, which serves a call with any
            that is not known here.

    Returns:
        ([batch, tokens, heads, head_dim] in the dtype of ``query``, None)
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None:
        apart = _apart(module, query, key, value, attention_mask, kwargs)
        if apart is not None:
            return apart, None
    ours = _serves(query, key, value, kwargs, _READ | UNREAD)
    if attention_mask is not None and (ours or _knows(query, key, value, kwargs, _READ | UNREAD)):
        attention_mask = _additive(attention_mask, torch.float32 if ours else query.dtype)
    if not ours:
        if attention_mask is None:  # with one, transformers itself gives each head its own
            key, value = unshared_heads(query, key, value)
        with preferred_kernels(query):
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[arg-type]
    fused = _fused(module, query, key, value, kwargs) if attention_mask is None else None
    if fused is not None:
        return fused, None
    return _widened(query, key, value, attention_mask, sdpa_attention_forward, module, kwargs)  # type: ignore[no-any-return]


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the model's own eager attention (the one with logit softcapping), widened like ``sdpa_attention``."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if not _serves(query, key, value, kwargs, _READ | UNREAD | {"softcap"}):
        return eager(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    out, weights = _widened(query, key, value, attention_mask, eager, module, kwargs)
    return out, weights if weights is None else weights.to(query.dtype)


def register_attention() -> None:
    """Make ``attn_implementation="spu"`` and ``"spu_eager"`` known to transformers, with their masks. Idempotent."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

    AttentionInterface.register(SDPA_NAME, sdpa_attention)
    AttentionMaskInterface.register(SDPA_NAME, sdpa_mask)
    AttentionInterface.register(EAGER_NAME, eager_attention)
    AttentionMaskInterface.register(EAGER_NAME, eager_mask)


def use_attention(model: nn.Module) -> None:
    """Switch a transformers model from "sdpa" or "eager" to the equivalents here, in place; other models stay.

    Every model within (a text and an image model, say) by its own configuration. Any other choice (flash attention,
    flex attention) was made by the user for a reason and is left alone, and so is a model whose code asks for the
    attention by its name, since it would take another way under another name.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(_without_adapters(model), transformers.PreTrainedModel):
        return
    register_attention()
    for part in _parts(model):
        current = part.config._attn_implementation
        if current not in _OURS or any(current in _names_asked_for(name) for name in _source_modules(part)):
            continue
        attentions = _source_modules(part, "Attention")
        if current == "sdpa" or all(hasattr(sys.modules[name], "eager_attention_forward") for name in attentions):
            part.set_attn_implementation({"": _OURS[current]})


def _without_adapters(model: nn.Module) -> nn.Module:
    """Return the model within a PeftModel, any other model itself; peft need not be there."""
    adapted = type(model).__module__.partition(".")[0] == "peft" and hasattr(model, "get_base_model")
    return model.get_base_model() if adapted else model  # type: ignore[operator, no-any-return]


def restore_attention(model: nn.Module) -> None:
    """Undo ``use_attention``."""
    plain = {ours: theirs for theirs, ours in _OURS.items()}
    for part in _parts(model):
        if part.config._attn_implementation in plain:
            part.set_attn_implementation({"": plain[part.config._attn_implementation]})


def _parts(model: nn.Module) -> Iterator[Any]:
    """Return the transformers models in a model, one for each configuration, that can be given an attention."""
    transformers = sys.modules.get("transformers")
    seen: set[int] = set()
    for module in model.modules():
        if transformers is None or not isinstance(module, transformers.PreTrainedModel) or id(module.config) in seen:
            continue
        seen.add(id(module.config))
        if getattr(module, "_can_set_attn_implementation", lambda: True)():
            yield module


def _source_modules(model: nn.Module, suffix: str = "") -> set[str]:
    """Return the names of the Python modules that define the model's classes (whose names end so)."""
    return {type(m).__module__ for m in model.modules() if type(m).__name__.endswith(suffix)}


@lru_cache(maxsize=1024)
def _names_asked_for(module: str) -> frozenset[str]:
    """Return the attentions that a module's source compares a configuration's with, as in ``== "sdpa"``."""
    if module.startswith(("torch.", "spu.")):
        return frozenset()
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return frozenset()
    compared = re.findall(r"_attn_implementation\s*(?:==|!=|in\b|not in\b)([^\n]*)", source)
    return frozenset(re.findall(r"[\"'](\w+)[\"']", " ".join(compared)))
