"""Rotary positions of transformers' attention on the op: which classes, the same results, and what stays theirs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from numeric import assert_equal
from torch import nn

from spu import nn as spu_nn
from spu.nn.rotary import FusedRotary, _form, rotary_block
from spu.nn.table import RotaryBlock
from spu.ops import backends, rotary, use_backend

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not backends()["cpu"].available, reason="spu._C is not built")
IDS = torch.arange(18).view(2, 9)


def decoder(family: str = "Llama", **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=32, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, **more,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def attention_of(model: Any) -> nn.Module:
    return next(module for module in model.modules() if type(module).__name__.endswith("Attention"))


def only_rotary(model: Any) -> Any:
    """Accelerate nothing else, so that results can be compared bit for bit."""
    for module in model.modules():
        if rotary_block(module) is not None:
            spu_nn.accelerate(module)
            for part in module.children():
                spu_nn.restore(part)
    return model


def neighbours(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return tuple(x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin for x in (q, k))


def test_the_function_tells_which_pairs_are_turned() -> None:
    assert rotary_block(attention_of(decoder("Llama"))) == RotaryBlock(False, whole=True)
    assert rotary_block(attention_of(decoder("Qwen3"))) == RotaryBlock(False, whole=False)  # it has norms
    assert rotary_block(attention_of(decoder("Cohere"))) is None  # it turns in fp32
    assert rotary_block(nn.MultiheadAttention(4, 2)) is None
    assert _form(neighbours) is True
    assert _form(lambda q, k, cos, sin: (q, k)) is None
    assert _form(lambda q, k, cos, sin: (q,)) is None
    assert _form(lambda q, k: (q, k)) is None


def test_fp32_results_and_gradients_are_theirs_to_the_bit() -> None:
    plain = decoder()
    model = only_rotary(copy.deepcopy(plain))
    assert isinstance(attention_of(model), FusedRotary)
    for one in (plain, model):
        one(IDS).logits.square().mean().backward()
    assert_equal(model(IDS).logits, plain(IDS).logits)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_equal(a.grad, b.grad, name)


def test_the_op_is_called_once_a_layer_and_not_on_the_reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []

    def spy(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(q.dtype)
        return rotary(q, *args, **kwargs)

    monkeypatch.setattr("spu.nn.rotary.rotary", spy)
    model = spu_nn.accelerate(decoder().to(torch.bfloat16))
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)  # so that the layer runs its parts one by one
    model(IDS)
    assert calls == [torch.bfloat16]
    with use_backend("reference"):
        model(IDS)
    assert calls == [torch.bfloat16]


def test_caches_old_keywords_copies_and_pickles() -> None:
    plain = decoder().eval()
    model = only_rotary(copy.deepcopy(plain)).eval()
    expected = plain.generate(IDS[:1, :4], max_new_tokens=5, do_sample=False)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(attention_of(one), FusedRotary)
        assert_equal(one.generate(IDS[:1, :4], max_new_tokens=5, do_sample=False), expected)
    state = torch.randn(1, 4, 24)
    angles = plain.model.rotary_emb(state, torch.arange(4)[None])
    for keyword in ("past_key_values", "cache"):
        caches = [transformers.DynamicCache(), transformers.DynamicCache()]
        for one, cache in zip((plain, model), caches, strict=True):
            try:
                attention_of(one)(state, position_embeddings=angles, attention_mask=None, **{keyword: cache})
            except TypeError:  # not a name of this version
                assert one is plain
                break
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
    assert type(spu_nn.restore(attention_of(model))) is type(attention_of(plain))


def test_attentions_are_still_recorded() -> None:
    plain = decoder(attn_implementation="eager")
    model = only_rotary(copy.deepcopy(plain))
    ours, theirs = (one(IDS, output_attentions=True).attentions for one in (model, plain))
    assert len(ours) == len(theirs) == 1
    assert_equal(ours[0], theirs[0])
