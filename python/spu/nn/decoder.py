"""Decoder layers of transformers, each half of them one op, and one node of the graph.

What such a layer computes is h = x + attention(norm(x)), then h + mlp(norm(h)); the ops need to know all that is in it.
So a layer is fused where ``accelerate`` knows its norms, its attention and its MLP, nobody watches or has replaced a
part, and the call is a training's: causal, without a cache or dropout, without a mask or with one that tells documents
and padding apart and nothing else, in 16 bits on a CPU. At every other call it runs its parts one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spu.common.dtypes import HALVES, STORAGE
from spu.common.torch_private import buffers_of, children_of, parameters_of, unset_fake_temporarily
from spu.nn.attention import SDPA_NAME, UNREAD
from spu.nn.blocks import (
    MIXINS,
    FusedBlock,
    FusedGated,
    activation_of,
    from_library,
    is_linear,
    unwatched,
    watched_globally,
)
from spu.nn.documents import document_lengths
from spu.nn.linear import Linear
from spu.nn.norm import FusedNorm
from spu.nn.rotary import PROJECTIONS, FusedRotary
from spu.nn.table import DecoderBlock, GatedBlock
from spu.ops import GATED_ACTIVATIONS, choose_backend
from spu.ops.decoder import AttentionForm, AttentionWeights, GatedForm, NormForm, attention_half, gated_half
from spu.ops.linear import compute_dtype
from spu.ops.plain import takes

__all__ = ["FusedDecoder", "decoder_block"]


class FusedDecoder(FusedBlock):
    """A decoder layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute hidden_states [batch, tokens, C] -> the same."""
        if len(args) == 1 and not torch.compiler.is_compiling() and _is_plain_call(kwargs):
            cos, sin = kwargs["position_embeddings"]
            y = _fused(self, args[0], cos, sin, kwargs.get("attention_mask"))
            if y is not None:
                return y
        return self.spu_plain.forward(self, *args, **kwargs)


MIXINS[DecoderBlock] = FusedDecoder


def _is_plain_call(kwargs: dict[str, Any]) -> bool:
    """Tell whether a call is without a cache, and known in every detail."""
    for name, value in kwargs.items():
        if value is not None and name not in UNREAD and name not in ("position_embeddings", "attention_mask"):
            return False
    angles = kwargs.get("position_embeddings")
    return isinstance(angles, tuple) and len(angles) == 2


def _fused(layer: FusedDecoder, x: Any, cos: Any, sin: Any, mask: Any) -> Tensor | None:
    """Compute a layer by two ops; None where they do not serve."""
    block = layer.spu_block
    assert isinstance(block, DecoderBlock)
    attention, mlp = getattr(layer, block.attention), getattr(layer, block.mlp)
    norms = [getattr(layer, name) for name in block.norms]
    layers = _parts(attention, mlp)
    if layers is None or watched_globally() or not all(isinstance(norm, FusedNorm) for norm in norms):
        return None
    dtype = layers[0].spu_dtype
    if any(part.spu_dtype != dtype for part in (*layers, mlp)) or not all(map(unwatched, (attention, mlp, *norms))):
        return None
    weights = [part.weight for part in layers]
    biases = [part.bias for part in layers]
    activation = activation_of(getattr(mlp, mlp.spu_block.activation))
    if (
        not takes(x, cos, sin, *weights, *biases)
        or activation not in GATED_ACTIVATIONS
        or any(bias is not None for bias in biases[4:])
    ):
        return None
    computed = compute_dtype(x, dtype) or x.dtype
    if not (_fits(attention, x, cos, sin, weights, computed) and all(norm.serves(x) for norm in norms)):
        return None
    if dtype is None and computed == x.dtype and any(w.dtype != computed for w in weights):
        return None  # the parts say what is wrong
    lengths = None
    if mask is not None:
        lengths = _documents(mask, x, weights[0])
        if lengths is None:
            return None
    forms = [NormForm(float(getattr(n, n.spu_block.eps)), n.spu_block.offset, n.spu_block.rounded) for n in norms]
    given = AttentionWeights(*weights[:4], *biases[:4])
    turned = attention.spu_block.interleaved
    form = AttentionForm(forms[0], computed, "cpu", attention.head_dim, float(attention.scaling), turned, lengths)
    h = attention_half(x, norms[0].weight, given, cos, sin, form)
    gate, up, down = weights[4:]
    return gated_half(h, norms[1].weight, gate, up, down, GatedForm(forms[1], computed, "cpu", str(activation)))


def _documents(mask: Any, x: Tensor, q_weight: Tensor) -> list[list[int]] | None:
    """Return the lengths of the documents of each row of x [batch, tokens, C]; None for other masks."""
    if not isinstance(mask, Tensor) or not takes(mask) or mask.shape != (x.shape[0], 1, x.shape[1], x.shape[1]):
        return None
    return document_lengths(mask, q_weight.shape[0])


def _parts(attention: Any, mlp: Any) -> list[Any] | None:
    """Return the linear layers of attention and MLP: q, k, v, o, gate, up, down; None where one is something else."""
    if not (isinstance(attention, FusedRotary) and attention.spu_block.whole and isinstance(mlp, FusedGated)):  # type: ignore
        return None
    block = mlp.spu_block
    assert isinstance(block, GatedBlock)
    layers = [getattr(attention, name) for name in PROJECTIONS]
    layers += [getattr(mlp, name) for name in (block.gate, block.up, block.down)]
    return layers if all(type(part) is Linear and is_linear(part) for part in layers) else None


def _fits(attention: Any, x: Tensor, cos: Tensor, sin: Tensor, weights: list[Tensor], computed: torch.dtype) -> bool:
    """Tell whether the attention op takes these tensors, and its module asks for no more than it does."""
    q, k, v, o, *_ = weights
    dim = attention.head_dim
    return (
        computed in HALVES
        and x.dtype in STORAGE
        and x.dim() == 3
        and x.numel() > 0
        and choose_backend(x, computed) == "cpu"
        and all(w.dtype in STORAGE and w.device == x.device for w in weights)
        and cos.shape == sin.shape == (cos.shape[0], x.shape[1], dim)
        and cos.shape[0] in (1, x.shape[0])
        and cos.dtype == sin.dtype
        and cos.dtype in (computed, torch.float32)
        and cos.device == sin.device == x.device
        and not (cos.requires_grad or sin.requires_grad)
        and dim % 2 == 0
        and k.shape == v.shape
        and k.shape[0] % dim == 0
        and q.shape[0] == k.shape[0] * attention.num_key_value_groups == o.shape[1]
        and q.shape[1] == k.shape[1] == o.shape[0] == x.shape[2]
        and attention.config._attn_implementation == SDPA_NAME
        and getattr(attention, "is_causal", True) is True
        and attention.scaling > 0
        and not (attention.training and getattr(attention, "attention_dropout", 0.0))
    )


def decoder_block(module: nn.Module) -> DecoderBlock | None:
    """Return the names of a decoder layer's parts; None where it is none, or computes anything else.

    The class's own forward says so: it is run once, on small values in fp16, bf16 and fp32 and with small functions in
    place of its parts, and must agree in every bit.
    """
    cls, block = type(module), DecoderBlock()
    if issubclass(cls, FusedBlock) or not from_library(cls) or not cls.__name__.endswith("DecoderLayer"):
        return None
    names = {block.attention, block.mlp, *block.norms}
    if set(children_of(module)) != names or parameters_of(module) or buffers_of(module):
        return None
    probe = cls.__new__(cls)
    nn.Module.__init__(probe)
    vars(probe).update({name: value for name, value in vars(module).items() if not name.startswith("_")})
    angles = object()
    first, second = _affine(1.3, -0.2), _affine(0.9, 0.3)
    attention, mlp = _affine(0.7, 0.1), _affine(0.5, -0.4)
    calls: list[dict[str, Any]] = []

    def attend(**kwargs: Any) -> tuple[Tensor, None]:
        calls.append(kwargs)
        return attention(kwargs["hidden_states"]), None

    vars(probe).update({block.attention: attend, block.mlp: mlp, block.norms[0]: first, block.norms[1]: second})
    with unset_fake_temporarily(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for dtype in STORAGE:
            x = torch.arange(24, dtype=torch.float32, device="cpu").mul(1.7).sin().view(2, 3, 4).to(dtype)
            h = x + attention(first(x))
            try:
                found = cls.forward(probe, x.clone(), attention_mask=None, position_embeddings=angles)
            except Exception:  # whatever it has instead
                return None
            expected = h + mlp(second(h))
            if not (isinstance(found, Tensor) and found.dtype == dtype and torch.equal(found, expected)):
                return None
    unchanged = all(call.get("position_embeddings") is angles and call.get("attention_mask") is None for call in calls)
    return block if unchanged else None


def _affine(factor: float, offset: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor + offset
