"""Decoder layers of transformers as two ops: which, their results and gradients, and when the parts run one by one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import make_decoder
from numeric import assert_close_to_truth, assert_equal
from op_checks import nodes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spu
from spu.nn.decoder import FusedDecoder, decoder_block
from spu.nn.rotary import FusedRotary, rotary_block
from spu.nn.table import DecoderBlock
from spu.ops import backends
from spu.ops.decoder import attention_half

pytestmark = pytest.mark.skipif(not backends()["cpu"].available, reason="spu._C is not built")
IDS = torch.arange(38).view(2, 19) * 7 % 64
HALVES = [torch.float16, torch.bfloat16]
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def decoder(family: str = "Llama", **options: Any) -> Any:
    return make_decoder(family, **{"num_hidden_layers": 2, "head_dim": 8, "use_cache": False, **options})


def halves(loss: Tensor) -> list[str]:
    """Return the names of the halves' nodes in a graph."""
    return nodes(loss, "_AttentionHalfBackward", "_GatedHalfBackward")


WHOLE = ["_AttentionHalfBackward"] * 2 + ["_GatedHalfBackward"] * 2  # of two layers


def by_parts(model: Any) -> Any:
    """Let every layer run its parts one by one: somebody watches one."""
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: None)
    return model


def loss_of(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    return model(input_ids=ids, labels=ids, **inputs).loss  # type: ignore[no-any-return]


def trained(model: Any, autocast: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
        loss = loss_of(model)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Gemma", "InternLM3", "Starcoder2"])
def test_layers_and_attentions_that_are_known(family: str) -> None:
    layer = decoder(family).model.layers[0]
    plain = type(layer)
    assert decoder_block(layer) == DecoderBlock()
    assert rotary_block(layer.self_attn).whole  # type: ignore[union-attr]
    assert type(spu.accelerate(layer)).__mro__[1] is FusedDecoder
    assert type(spu.restore(layer)) is plain


def test_layers_and_attentions_that_compute_something_else() -> None:
    assert decoder_block(decoder("Granite").model.layers[0]) == DecoderBlock()
    assert decoder_block(decoder("Granite", residual_multiplier=0.5).model.layers[0]) is None
    assert decoder_block(decoder("Gemma2").model.layers[0]) is None  # norms after its parts
    assert decoder_block(nn.TransformerDecoderLayer(4, 2)) is None
    assert not rotary_block(decoder("Qwen3").model.layers[0].self_attn).whole  # type: ignore[union-attr]
    assert not rotary_block(decoder("Olmo", clip_qkv=4.0).model.layers[0].self_attn).whole  # type: ignore[union-attr]
    smol = decoder("SmolLM3", no_rope_layers=[1, 0]).model.layers
    assert [rotary_block(layer.self_attn).whole for layer in smol] == [True, False]  # type: ignore[union-attr]


def test_looking_at_a_model_draws_no_random_numbers_and_leaves_its_attention() -> None:
    model = decoder()
    before = torch.get_rng_state()
    assert decoder_block(model.model.layers[0])
    assert rotary_block(model.model.layers[0].self_attn)
    assert_equal(torch.get_rng_state(), before)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma"])
def test_a_16_bit_model_has_the_parts_results_to_the_bit_and_gradients_as_close(family: str, dtype: Any) -> None:
    plain = decoder(family)
    fused = spu.accelerate(copy.deepcopy(plain).to(dtype))
    parts = by_parts(spu.accelerate(copy.deepcopy(plain).to(dtype)))
    assert halves(loss_of(fused)) == WHOLE
    assert not halves(loss_of(parts))
    loss, grads = trained(fused)
    expected, expected_grads = trained(parts)
    assert_equal(loss, expected)
    with torch.no_grad():
        assert_equal(loss_of(fused), loss)
    # The same values in fp64, and in plain torch.
    truth = trained(copy.deepcopy(plain).to(dtype).double())[1]
    for name, grad in grads.items():
        assert_close_to_truth(grad, expected_grads[name], truth[name], name=name)


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_rows_of_documents_and_padded_rows_have_the_parts_results_to_the_bit_too(rows: str) -> None:
    plain = decoder(max_position_embeddings=256).to(torch.float16)
    ids = torch.arange(512).view(2, 256) * 7 % 64
    places = torch.cat([torch.arange(100), torch.arange(156)])
    packed, padded = (
        {"position_ids": places.expand(2, -1)},
        {"attention_mask": (torch.arange(512).view(2, 256) < 400) * 1},
    )
    given = packed if rows == "packed" else padded
    results = []
    for model in (spu.accelerate(copy.deepcopy(plain)), by_parts(spu.accelerate(copy.deepcopy(plain))), plain.double()):
        loss = loss_of(model, ids, **given)
        assert bool(halves(loss)) == (not results)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert_equal(results[0][0], results[1][0])
    for mine, parts, truth in zip(*results, strict=True):
        assert_close_to_truth(mine, parts, truth)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize("how", ["precision", "autocast"])
def test_an_fp32_model_is_as_close_to_the_truth_as_plain_torch_in_16_bits(family: str, dtype: Any, how: str) -> None:
    plain = decoder(family)
    model = spu.accelerate(copy.deepcopy(plain), NAMES[dtype] if how == "precision" else None)
    autocast = dtype if how == "autocast" else None
    with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
        assert halves(loss_of(model)) == WHOLE
    loss, grads = trained(model, autocast)
    expected, expected_grads = trained(copy.deepcopy(plain), dtype)
    truth, true_grads = trained(copy.deepcopy(plain).double())
    assert_close_to_truth(loss, expected.float(), truth, eps=torch.finfo(dtype).eps * float(truth))
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        eps = torch.finfo(dtype).eps * float(true_grads[name].abs().max())
        assert_close_to_truth(grad, expected_grads[name], true_grads[name], eps=eps, name=name)


def test_a_loss_scale_goes_to_the_main_gradients_and_an_overflow_is_found() -> None:
    plain = decoder("Qwen2")
    truth = trained(copy.deepcopy(plain).double())[1]
    model = spu.accelerate(plain, "fp16")
    scaler = spu.GradScaler("cpu", init_scale=2.0**13)
    for _ in range(2):
        scaler.scale(loss_of(model)).backward()
    for name, parameter in model.named_parameters():
        bound = 2e-2 * float(truth[name].abs().max()) + 1e-6
        assert parameter.grad.dtype == torch.float32
        assert float((parameter.grad / 2 - truth[name]).abs().max()) < bound, name
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = torch.inf
    optimizer = spu.optim.AdamW(model.parameters(), lr=1.0)
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_equal(model.model.layers[0].self_attn.q_proj.weight, before)
    assert scaler.get_scale() == 2.0**12


def watch(find: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    return lambda model: find(model.model.layers[0]).register_forward_hook(lambda *_: None)  # type: ignore[return-value]


def give_bias(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.zeros(48, dtype=torch.bfloat16))


class Adapter(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)  # type: ignore[no-any-return]


def adapt(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.v_proj = Adapter(attention.v_proj)


REASONS: dict[str, Callable[[Any], Any]] = {
    "hook on a norm": watch(lambda layer: layer.input_layernorm),
    "hook on the attention": watch(lambda layer: layer.self_attn),
    "hook on a product": watch(lambda layer: layer.self_attn.k_proj),
    "hook on the activation": watch(lambda layer: layer.mlp.act_fn),
    "backward hook": lambda model: model.model.layers[0].mlp.register_full_backward_hook(lambda *_: None),
    "forward replaced": lambda model: setattr(
        model.model.layers[0].self_attn, "forward", model.model.layers[0].self_attn.forward
    ),
    "adapter": adapt,
    "bias in the MLP": give_bias,
    "dropout": lambda model: setattr(model.model.layers[0].self_attn, "attention_dropout", 0.1),
    "bidirectional": lambda model: setattr(model.model.layers[0].self_attn, "is_causal", False),
    "another precision": lambda model: spu.accelerate(model.model.layers[0].mlp, "fp32"),
    "restored": lambda model: spu.restore(model.model.layers[0].self_attn),
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_layer_that_is_watched_or_changed_runs_its_parts(reason: str) -> None:
    model = spu.accelerate(decoder().to(torch.bfloat16))
    REASONS[reason](model)
    assert halves(loss_of(model)) == WHOLE[1:3]  # the other layer's


def test_calls_that_are_no_plain_training_run_the_parts() -> None:
    model = spu.accelerate(decoder().to(torch.bfloat16))
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    assert not halves(loss_of(model, attention_mask=mask))
    assert not halves(model(IDS, use_cache=True).logits.sum())
    assert halves(model(IDS, use_cache=False).logits.sum()) == WHOLE
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not halves(loss_of(model))
    handle.remove()
    with spu.ops.use_backend("reference"):
        assert not halves(loss_of(model))
    assert not halves(loss_of(spu.accelerate(decoder())))  # fp32
    assert not halves(loss_of(spu.accelerate(decoder(attn_implementation="eager").to(torch.bfloat16))))
    assert halves(loss_of(model)) == WHOLE


def test_recorded_states_are_those_of_the_parts() -> None:
    model = spu.accelerate(decoder().to(torch.bfloat16))
    parts = by_parts(copy.deepcopy(model))
    for a, b in zip(*(one(IDS, output_hidden_states=True).hidden_states for one in (model, parts)), strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("frozen", ["norm", "q_proj", "self_attn", "mlp", "down_proj", "embed", "all but k_proj"])
def test_frozen_parameters(frozen: str) -> None:
    model = spu.accelerate(decoder("Qwen2"), "bf16")
    whole = trained(copy.deepcopy(model))[1]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("k_proj" in name if frozen.startswith("all") else frozen not in name)
    assert halves(loss_of(model)) == WHOLE
    grads = trained(model)[1]
    assert any(grad is None for grad in grads.values())
    for name, parameter in model.named_parameters():
        assert (grads[name] is None) == (not parameter.requires_grad)
        if grads[name] is not None:
            assert_equal(grads[name], whole[name], name)


def test_recompute_gives_the_same_gradients() -> None:
    model = spu.accelerate(decoder(), "bf16")
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for a, b in zip(trained(model)[1].values(), trained(again)[1].values(), strict=True):
        assert_equal(a, b)
    layer, x = spu.accelerate(decoder()).to(torch.bfloat16).model.layers[0], torch.randn(2, 5, 32).bfloat16()
    angles = model.model.rotary_emb(x, torch.arange(5)[None])
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    layer.self_attn.config._attn_implementation = "spu"
    layer(leaves[0], position_embeddings=angles).sum().backward()
    run = lambda h: layer(h, position_embeddings=angles)  # noqa: E731
    checkpoint(run, leaves[1], use_reentrant=True).sum().backward()
    assert_equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
def test_the_trainer_runs_layers_whole(monkeypatch: pytest.MonkeyPatch, schedule: str) -> None:
    calls: list[torch.dtype] = []

    def spy(x: Tensor, *args: Any) -> Tensor:
        calls.append(x.dtype)
        return attention_half(x, *args)

    monkeypatch.setattr("spu.nn.decoder.attention_half", spy)
    results = []
    for whole in (True, False):
        model = decoder() if whole else by_parts(decoder())
        trainer = spu.ModelParallelTrainer(
            model, devices=["cpu:0", "cpu:1"], lr=1e-2, precision="fp16", microbatches=2, schedule=schedule
        )
        losses = [float(trainer.step(IDS[:, :-1], IDS[:, 1:]).loss)]  # which also counts its layers' costs
        calls.clear()
        results.append(losses + [float(trainer.step(IDS[:, :-1], IDS[:, 1:]).loss) for _ in range(2)])
        assert len(calls) == (2 * 2 * 2 if whole else 0)
    # Dot products of rounded gradients, in another order; the step is at its first, largest updates.
    assert results[0] == pytest.approx(results[1], rel=2e-3)


@pytest.mark.leaks_threads  # the compiler's
def test_second_derivatives_are_refused_copies_pickle_and_the_compiler_sees_the_parts() -> None:
    model = spu.accelerate(decoder().to(torch.bfloat16))
    x = torch.randn(1, 4, 32).bfloat16().requires_grad_()
    layer, angles = model.model.layers[0], model.model.rotary_emb(x, torch.arange(4)[None])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(layer(x, position_embeddings=angles).sum(), x, create_graph=True)
    for one in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(one) is type(layer)
        assert_equal(one(x, position_embeddings=angles), layer(x, position_embeddings=angles))
    compiled = torch.compile(layer, backend="aot_eager")(x, position_embeddings=angles)
    torch.testing.assert_close(compiled, layer(x, position_embeddings=angles), rtol=2e-2, atol=2e-2)
    assert isinstance(layer.self_attn, FusedRotary)
