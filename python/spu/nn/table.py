"""Which modules of other libraries ``accelerate`` knows, by class name: data alone."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ACTIVATIONS",
    "BLOCKS",
    "LIBRARIES",
    "Block",
    "DecoderBlock",
    "ExpertsBlock",
    "GatedBlock",
    "NormBlock",
    "PairBlock",
    "RotaryBlock",
    "TransposedLinear",
]

LIBRARIES = ("transformers", "transformers_modules")  # a class counts only if it was defined in one of these


@dataclass(frozen=True)
class GatedBlock:
    """down(act(gate(x)) * up(x)); the names of the attributes."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"


@dataclass(frozen=True)
class PairBlock:
    """rest(act(linear(x))): a linear layer, its activation, and what follows; the names of the attributes."""

    linear: str
    activation: str
    rest: tuple[str, ...] = ()


@dataclass(frozen=True)
class TransposedLinear:
    """x @ weight + bias, weight [in, out]."""


@dataclass(frozen=True)
class NormBlock:
    """x / sqrt(mean(x^2) + eps) * (weight + offset); the name of eps, and whether the row is rounded before the weight.

    Found by ``spu.nn.norm.norm_block``, not by name.
    """

    eps: str
    offset: float
    rounded: bool


@dataclass(frozen=True)
class RotaryBlock:
    """An attention that turns queries and keys. Found by ``spu.nn.rotary``.

    Attributes:
        interleaved: pairs are neighbours.
        whole: there is nothing in it but q_proj, k_proj, v_proj, the turn, an attention and o_proj.
    """

    interleaved: bool
    whole: bool = False


@dataclass(frozen=True)
class DecoderBlock:
    """h = x + attention(norm(x)), then h + mlp(norm(h)); the names of the attributes. Found by ``spu.nn.decoder``."""

    attention: str = "self_attn"
    mlp: str = "mlp"
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class ExpertsBlock:
    """Gated experts in two parameters; the names of the attributes. Found by ``spu.nn.experts``."""

    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"


Block = DecoderBlock | ExpertsBlock | GatedBlock | NormBlock | PairBlock | RotaryBlock | TransposedLinear

BLOCKS: dict[str, Block] = {
    **dict.fromkeys(
        (
            "LlamaMLP",
            "InternLM3MLP",
            "Internlm3MLP",
            "MistralMLP",
            "Qwen2MLP",
            "Qwen3MLP",
            "GemmaMLP",
            "Gemma2MLP",
            "Gemma3MLP",
        ),
        GatedBlock(),
    ),
    "InternLM2MLP": GatedBlock(gate="w1", up="w3", down="w2"),
    "Conv1D": TransposedLinear(),
    "GPT2MLP": PairBlock("c_fc", "act", ("c_proj", "dropout")),
    "GPTNeoXMLP": PairBlock("dense_h_to_4h", "act", ("dense_4h_to_h",)),
    **dict.fromkeys(
        ("BertIntermediate", "RobertaIntermediate", "XLMRobertaIntermediate", "ElectraIntermediate", "ViTIntermediate"),
        PairBlock("dense", "intermediate_act_fn"),
    ),
}

# Activation classes by name, but for nn.GELU, whose option decides.
ACTIVATIONS = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
}
