"""What the lease measures: the cases of ``cases.py`` in groups, at the shapes that a short time allows, and a layer.

A group is a process of the lease. The same calls are recorded at home (``carry.py``), to compile their kernels ahead;
and rehearsed small, interpreted on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from cases import BARE, Call, Case, Setting, cases, name_of, rehearsal
from layer_cases import layer_cases
from torch import Tensor, nn

NUMEL = 256 << 20  # elements of the optimizer's lists and of wires: several times the cache
VOCABULARY = 92544


def on_card(device: str = "cuda", numel: int = NUMEL) -> Setting:
    """Return the shapes of a 7B decoder's MLP at 4,096 to 256 tokens, and an 8192-cube."""
    return Setting(device, ((4096, 14336),), (4096, 1024, 256), (8192,), numel, VOCABULARY, ((4096, 14336, 4096),))


def _layer(at: Setting, peer: str) -> Call:
    """Forward and backward of one decoder layer, 4,096 tokens in sequences of 1,024."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    import spu

    hidden, inner = at.decoders[0]
    features = 128 if hidden >= 1024 else 8
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=hidden // features,
        num_key_value_heads=max(1, hidden // features // 4), head_dim=features, num_hidden_layers=1,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    layer: Any = LlamaDecoderLayer(config, 0).to(at.device).half()
    rows = max(1, at.tokens[0] // 1024)
    x = at.random(rows, at.tokens[0] // rows, hidden).requires_grad_()
    rotary = LlamaRotaryEmbedding(config).to(at.device)
    places = torch.arange(x.shape[1], device=at.device)[None]
    angles = rotary(x, places)
    run = layer
    if peer.startswith("spu"):
        run = spu.accelerate(layer)
    elif peer == "torch.compile":
        run = torch.compile(layer)
    dy = at.random(*x.shape)

    def step() -> None:
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        with spu.ops.use_backend("triton" if peer == "spu triton" else None):
            out = run(x, position_embeddings=angles, position_ids=places, attention_mask=None)
        (out[0] if isinstance(out, tuple) else out).backward(dy)

    return step


def _layers(at: Setting) -> Iterator[Case]:
    hidden, inner = at.decoders[0]
    flops = 6.0 * at.tokens[0] * (2.5 * hidden * hidden + 3 * hidden * inner)
    compiled = ["torch.compile"] if at.compiled else []
    for peer in ("spu", "spu triton", "torch eager", *compiled):
        yield Case(
            "decoder layer step", name_of((at.tokens[0], inner, hidden)), peer, flops, 0.0, partial(_layer, at, peer)
        )


_LEFT_OUT = ("pack fp16", "unpack fp16", "pack int4", "unpack int4", "pack fp8", "unpack fp8")
_PREFIXES = {
    "forward": ("forward",), "dx": ("dx",), "dw": ("dw",), "memory": ("adamw", "grad_norm", "pack", "unpack"),
    "attention": ("attention",), "gated": ("gated",), "ce": ("linear cross-entropy",), "linear": ("step of",),
}  # fmt: skip


# Peers that decide: in a group that is cut, every shape has these before any has the others.
_FIRST = ("spu triton", "spu", "spu cuBLASLt", "spu Triton kernel", BARE, "cuBLAS, fp32 C", "torch addmm + gelu")


def _of_cases(at: Setting, group: str) -> Iterator[Case]:
    """The cases of ``cases.py`` that belong to a group, first those of the peers that decide; "other": those that
    belong to none.
    """
    found = list(_in_group(at, group))
    yield from sorted(found, key=lambda case: case.peer not in _FIRST) if group in ("forward", "dx", "dw") else found


def _in_group(at: Setting, group: str) -> Iterator[Case]:
    known = tuple(prefix for prefixes in _PREFIXES.values() for prefix in prefixes)
    for case in cases(at):
        if case.group.startswith(_LEFT_OUT):
            continue
        mine = case.group.startswith(_PREFIXES[group]) if group != "other" else not case.group.startswith(known)
        if mine:
            yield case


GROUPS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    **{name: partial(_of_cases, group=name) for name in _PREFIXES},
    "layer": _layers,
    "between": layer_cases,
    "other": partial(_of_cases, group="other"),
}


def small() -> Setting:
    """Return the rehearsal's shapes."""
    return rehearsal()


def decoder(vocabulary: int, width: int, inner: int, layers: int, heads: int, kv_heads: int) -> nn.Module:
    """Return a decoder with random weights of a fixed seed, on the CPU in fp32."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def batches(steps: int, rows: int, tokens: int, vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches that can be learnt: every sequence counts up from a random number."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, vocabulary, (steps, rows, 1), generator=generator)
    ids = (starts + torch.arange(tokens + 1)) % vocabulary
    return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in ids]
