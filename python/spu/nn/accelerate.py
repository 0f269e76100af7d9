"""``accelerate`` and ``restore``: a model's layers on fused ops, and back."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from spu.common.dtypes import DTYPES
from spu.nn.attention import restore_attention, use_attention
from spu.nn.blocks import MIXINS, FusedBlock, FusedSequential, from_library, fused_class
from spu.nn.decoder import decoder_block
from spu.nn.embedding import Embedding
from spu.nn.experts import experts_block
from spu.nn.linear import Linear
from spu.nn.norm import LayerNorm, RMSNorm, norm_block
from spu.nn.rotary import rotary_block
from spu.nn.table import BLOCKS

__all__ = ["accelerate", "is_accelerated", "restore"]

_Model = TypeVar("_Model", bound=nn.Module)
_MARK = "_spu_accelerated"
_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.Embedding: Embedding,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
}
_PLAIN = {ours: plain for plain, ours in _OURS.items()}


def _fused_form(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that replaces a module's, or None."""
    cls = type(module)
    if cls in _OURS:
        return _OURS[cls]
    if cls is nn.Sequential:
        return fused_class(FusedSequential, cls, None)
    named = BLOCKS.get(cls.__name__) if from_library(cls) and not issubclass(cls, FusedBlock) else None
    block = named or norm_block(module) or rotary_block(module) or decoder_block(module) or experts_block(module)
    return None if block is None else fused_class(MIXINS[type(block)], cls, block)


def accelerate(model: _Model, precision: str | None = None) -> _Model:
    """Put a model's linear layers, norms, embeddings and MLP blocks on fused ops, in place, and return it.

    What changes: every ``nn.Linear``, ``nn.Embedding``, ``nn.LayerNorm`` and ``nn.RMSNorm``; in an ``nn.Sequential``, a
    linear layer and the ReLU, GELU or SiLU after it run as one op; of Hugging Face transformers, the MLP blocks of
    Llama, InternLM3, Qwen2, Qwen3, Mistral, Gemma, GPT-2, GPT-NeoX and the BERT family (``spu.nn.table``), every
    mixture of gated experts in two parameters (Qwen3-MoE, Mixtral and their like: ``spu.nn.experts``), and every
    RMSNorm and rotary position whose formula the op computes to the bit. A Hugging Face model given whole also gets
    ``spu.nn.attention`` in place of torch's, which differs for 16-bit tensors on a CPU; with it, a decoder layer of
    Llama's form is two ops there (``spu.nn.decoder``). Only exact classes change, and only in class: parameters, hooks,
    training mode and state_dict keys stay the same objects. Parts of a block that have hooks, or were replaced later,
    run one by one as before. ``restore`` undoes it.

    Args:
        precision: what the fused ops compute in: "fp16", "bf16" or "fp32", whatever the parameters' dtype, in and
            outside ``torch.autocast``; their results have their inputs' dtype. Default: autocast's dtype inside
            ``torch.autocast``, else the parameters' own. Parameters are not converted. It holds for ``spu.nn.Linear``
            too.

    Raises:
        ValueError: for an unknown precision.
        TypeError: for what is no module.
    """
    if not isinstance(model, nn.Module):
        made = f", such as {model.__name__}(...)" if isinstance(model, type) else ""
        raise TypeError(f"accelerate takes a module, got {model!r}: give the model{made}")
    if precision is not None and precision not in DTYPES:
        raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(map(repr, DTYPES))}, or None")
    dtype = None if precision is None else DTYPES[precision]
    for module in model.modules():
        fused = _fused_form(module)
        if fused is not None:
            module.__class__ = fused
            setattr(module, _MARK, True)
        if isinstance(module, (Linear, FusedBlock)):
            module.spu_dtype = dtype  # type: ignore[assignment]
    use_attention(model)
    return model


def restore(model: _Model) -> _Model:
    """Undo ``accelerate``, in place; modules that were built as ``spu.nn.Linear`` stay, without a precision.

    Raises:
        ValueError: if a module's class was changed again since; nothing is restored then.
    """
    plain = {module: _plain_form(name, module) for name, module in model.named_modules() if _MARK in module.__dict__}
    for module in model.modules():
        if module in plain or isinstance(module, Linear):
            module.__dict__.pop("spu_dtype", None)
    for module, cls in plain.items():
        del module.__dict__[_MARK]
        module.__class__ = cls
    restore_attention(model)
    return model


def is_accelerated(module: nn.Module) -> bool:
    """Tell whether ``accelerate`` has changed this module, without a look at its children."""
    return _MARK in module.__dict__ or isinstance(module, Linear)


def _plain_form(name: str, module: nn.Module) -> type[nn.Module]:
    """Return the class that an accelerated module had."""
    cls = type(module)
    if cls in _PLAIN:
        return _PLAIN[cls]
    if isinstance(module, FusedBlock) and "spu_plain" in cls.__dict__:
        return module.spu_plain
    raise ValueError(
        f"module {name!r} was accelerated and is a {cls.__name__} since: undo what changed its class (for a "
        "parametrization: torch.nn.utils.parametrize.remove_parametrizations) and call restore again"
    )
