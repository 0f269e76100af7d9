"""A split decoder must give the bits of the whole model: loss, logits and every gradient."""

from __future__ import annotations

import contextlib
import copy
from functools import partial

import pytest
import torch
from together import together

transformers = pytest.importorskip("transformers")

from families import BUILT, PLANNED  # noqa: E402
from families import make_decoder as make_model  # noqa: E402
from numeric import assert_close_to_truth  # noqa: E402

from spu.common.absent import is_absent  # noqa: E402
from spu.model import huggingface as hf  # noqa: E402
from spu.model.convert.empty import meta_parameters  # noqa: E402
from spu.model.deferred import defer  # noqa: E402
from spu.nn import attention as hf_attention  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def make_inputs(kind: str):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(64, (2, 16), generator=generator)
    if kind == "ids":
        return ids
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    if kind == "mask":
        return {"input_ids": ids, "attention_mask": mask}
    return {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(16).flip(0).repeat(2, 1)}


def run_split(layers, inputs, cuts=()):
    """Logits of the split model; at each cut the graph is detached, as between stages. Returns (logits, backward)."""
    x, bridges = inputs, []
    for index, (_, layer) in enumerate(layers):
        if index in cuts:
            leaf = x.detach().requires_grad_(True)
            bridges.append((x, leaf))
            x = leaf
        x = layer(x, inputs) if index else layer(inputs, inputs)

    def backward(loss):
        loss.backward()
        for output, leaf in reversed(bridges):
            output.backward(leaf.grad)

    return x, backward


def loss_of(logits):
    targets = torch.randint(64, (32,), generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if not torch.equal(actual, expected):
        where = (actual != expected).nonzero()[0].tolist()
        values = actual[tuple(where)].item(), expected[tuple(where)].item()
        raise AssertionError(f"{what} {tuple(actual.shape)} differs at {where}: {values[0]!r} against {values[1]!r}")


def assert_split_is_exact(model, inputs, cuts=(2, 4)):
    whole = copy.deepcopy(model)
    kwargs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    expected = whole(**kwargs, use_cache=False).logits
    loss = loss_of(expected)
    loss.backward()

    logits, backward = run_split(hf.decoder_layers(model), inputs, cuts)
    assert_same_bits(logits, expected, "logits")
    split_loss = loss_of(logits)
    backward(split_loss)
    assert_same_bits(split_loss, loss, "loss")
    gradients = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert_same_bits(parameter.grad, gradients[name].grad, f"gradient of {name}")


@pytest.mark.parametrize("kind", ["ids", "mask", "positions"])
@pytest.mark.parametrize("family", [*PLANNED, *BUILT, "Llama4Text"])
def test_split_equals_whole(family, kind):
    # A tied weight used on both sides of a cut sums its two gradients in another order: compared untied here.
    assert_split_is_exact(make_model(family, tie_word_embeddings=False), make_inputs(kind))


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_tied_embeddings_share_the_parameter(family):
    model = make_model(family, tie_word_embeddings=True)
    layers = dict(hf.decoder_layers(model))
    assert layers["embed"].embed_tokens.weight is layers["head"].lm_head.weight
    assert_split_is_exact(make_model(family, tie_word_embeddings=True), make_inputs("ids"), cuts=())


def test_what_follows_the_head_is_honoured():
    capped = make_model("Gemma3Text", final_logit_softcapping=0.01)
    layers = hf.decoder_layers(capped)
    logits, _ = run_split(layers, make_inputs("ids"))
    assert logits.abs().max() <= 0.01


@pytest.mark.parametrize("family", ["InternLM3", "Qwen2", "Gemma3Text"])
def test_half_parts_equal_transformers_own_half_model(family, tmp_path):
    """`.half()` on the parts gives the model that transformers loads in fp16 (its rotary tables stay fp32)."""
    model = make_model(family, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    hf_attention.use_attention(loaded)
    ids = make_inputs("ids")
    layers = hf.decoder_layers(model)
    for _, layer in layers:
        layer.half()
    with torch.no_grad():
        logits, _ = run_split(layers, ids)
        assert logits.dtype == torch.float16
        assert_same_bits(logits, loaded(input_ids=ids, use_cache=False).logits, "fp16 logits")
    calls = layers[1][1]._context.layer_calls(torch.zeros(2, 16, 32), ids)
    assert calls[0][1]["position_embeddings"][0].dtype == torch.float32


def test_parameter_names_cover_the_state_dict_once():
    model = make_model("Qwen3", tie_word_embeddings=False)
    names: dict[str, torch.Tensor] = {}
    for _, layer in hf.decoder_layers(model):
        local = dict(layer.named_parameters())
        for key, full in layer.parameter_names().items():
            assert full not in names
            names[full] = local[key]
    own = dict(model.named_parameters())
    assert names.keys() == own.keys()
    assert all(names[key] is own[key] for key in own)


def test_layer_names_follow_the_model():
    names = [name for name, _ in hf.decoder_layers(make_model("InternLM3"))]
    assert names == ["embed", "layers.0", "layers.1", "layers.2", "layers.3", "head"]


def test_stages_in_threads_do_not_disturb_each_other():
    """Microbatches with masks of their own, in threads at once: each gets its own result."""
    layers = hf.decoder_layers(make_model("Gemma2"))
    batches, expected = [], []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(64, (2, 16), generator=generator)
        mask = (torch.arange(16) < torch.tensor([[16], [4 + 2 * seed]])).long()
        batches.append({"input_ids": ids, "attention_mask": mask} if seed else ids)
    with torch.no_grad():
        expected = [run_split(layers, batch)[0] for batch in batches]
    failures: list[str] = []

    def work(which: int) -> None:
        torch.set_num_threads(1)
        for _ in range(10):
            with torch.no_grad():
                logits, _ = run_split(layers, batches[which])
            if not torch.equal(logits, expected[which]):
                failures.append(f"batch {which}")

    together(*(partial(work, k) for k in range(4)))
    assert not failures


def test_context_is_computed_once_per_shape_and_once_per_masked_batch(monkeypatch):
    layers = hf.decoder_layers(make_model("Llama"))
    context = layers[1][1]._context
    runs = []
    original = context.run
    monkeypatch.setattr(context, "run", lambda *a: runs.append(1) or original(*a))
    with torch.no_grad():
        run_split(layers, make_inputs("ids"))
        run_split(layers, make_inputs("ids") + 0)
        assert len(runs) == 1, "ids of one shape share one context"
        run_split(layers, make_inputs("mask"))  # proves what such masks make of the arguments
        masked, proved = make_inputs("mask"), len(runs)
        run_split(layers, masked)
        assert len(runs) == proved + 1, "the layers of one masked batch share one context"
        before = run_split(layers, masked)[0]
        masked["attention_mask"][1, 3:] = 0
        after = run_split(layers, masked)[0]
    assert not torch.equal(before, after), "a mask changed in place is seen"


def test_evaluation_under_inference_mode_does_not_spoil_training():
    layers = hf.decoder_layers(make_model("Llama"))
    with torch.inference_mode():
        run_split(layers, make_inputs("ids"))
    logits, backward = run_split(layers, make_inputs("ids"))
    backward(loss_of(logits))


def test_layers_run_on_fake_and_meta_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    layers = hf.decoder_layers(make_model("Mistral"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = copy.deepcopy(layers[1][1])
        out = fake(mode.from_tensor(torch.zeros(2, 16, 32)), mode.from_tensor(make_inputs("ids")))
    assert out.shape == (2, 16, 32)
    meta = copy.deepcopy(layers[1][1]).to("meta")
    assert meta(torch.zeros(2, 16, 32, device="meta"), make_inputs("ids").to("meta")).device.type == "meta"
    real = layers[1][1](torch.zeros(2, 16, 32), make_inputs("ids"))
    assert type(real) is torch.Tensor, "fake contexts are not kept for real tensors"


def test_models_that_are_no_decoders_are_refused_by_name():
    with pytest.raises(ValueError, match=r"LlamaModel has no language-model head.*AutoModelForCausalLM"):
        hf.decoder_layers(make_model("Llama").model)
    with pytest.raises(ValueError, match="Linear is not a transformers model"):
        hf.decoder_layers(torch.nn.Linear(2, 2))
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"BertForMaskedLM keeps its token embedding outside bert.encoder"):
        hf.decoder_layers(transformers.BertForMaskedLM(config))
    with pytest.raises(ValueError, match=r"OPTForCausalLM leaves out layers by chance.*set config.layerdrop=0.0"):
        hf.decoder_layers(make_model("OPT", layerdrop=0.1))
    with pytest.raises(ValueError, match=r"is set to flex attention, which has no backward on CPUs.*\('sdpa'\)"):
        hf.decoder_layers(make_model("Llama", attn_implementation="flex_attention"))
    gpt = transformers.OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    with pytest.raises(ValueError, match=r"OpenAIGPTLMHeadModel cannot be run in parts: StopIteration; it cannot be"):
        hf.decoder_layers(transformers.OpenAIGPTLMHeadModel(gpt))  # its base model asks its parameters for a dtype
    with pytest.raises(ValueError, match=r"MixtralForCausalLM adds a router loss.*output_router_logits=False"):
        hf.decoder_layers(make_model("Mixtral", output_router_logits=True))


def test_models_that_cannot_be_split_exactly_are_refused_with_the_layer():
    stray = make_model("Llama")
    stray.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"parameters outside its embedding, layers, norm and head \(model.extra.weight"
    ):
        hf.decoder_layers(stray)
    count = make_model("GPT2")
    count.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"should have one list of 5 layers.*transformer.h \(4\)"):
        hf.decoder_layers(count)

    class Base(type(make_model("Llama").model)):
        """Gives its layers what it finds in ``given``."""

        def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
            hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            rotary = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            for index, layer in enumerate(self.layers):
                hidden, rotary = self.between(index, hidden, rotary)
                hidden = layer(hidden, position_embeddings=rotary, attention_mask=None)
            return transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    def refusal(between):
        model = make_model("Llama")
        model.model.__class__ = Base
        model.model.between = between
        with pytest.raises(ValueError, match="LlamaForCausalLM") as caught:
            hf.decoder_layers(model)
        return str(caught.value)

    scaled = refusal(lambda index, hidden, rotary: (hidden * 2 if index == 2 else hidden, rotary))
    assert "changes hidden states between layers 1 and 2" in scaled
    seen = refusal(lambda index, hidden, rotary: (hidden, (rotary[0] + hidden.mean() * (index == 2), rotary[1])))
    assert "inputs that depend on the embedding" in seen


@pytest.mark.parametrize("deferred", [False, True])
def test_a_layer_that_depends_on_another_is_refused_by_the_proof(deferred: bool):
    """What no shape shows: a block that reads what the block before it left behind. Also before weights are read."""
    with meta_parameters() if deferred else contextlib.nullcontext():
        model = make_model("Llama")
    if deferred:
        defer(model, lambda tensors: None)
    first, second = model.model.layers[1], model.model.layers[2]
    forward = second.forward
    first.register_forward_hook(lambda module, args, out: setattr(module, "left", out.detach().mean()))
    calls = []

    def reads(hidden, *args, **kwargs):
        calls.append(1)
        return forward(hidden, *args, **kwargs) + first.left * len(calls)

    second.forward = reads
    with pytest.raises(ValueError, match=r"layers.2 alone returns other values than in the whole model"):
        hf.decoder_layers(model)
    assert all(is_absent(parameter) == deferred for parameter in model.parameters())
    assert model.training
    assert all(module.training for module in model.modules())


def test_dynamic_rotary_tables_are_those_of_a_fresh_model():
    """transformers keeps the tables of the longest sequence seen; a microbatch gets those of its own length."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make_model("Llama", max_position_embeddings=8, rope_parameters=rope)
    layers = hf.decoder_layers(copy.deepcopy(model))
    for tokens in (16, 8, 12, 16, 4):
        ids = torch.arange(tokens)[None] % 64
        with torch.no_grad():
            logits, _ = run_split(layers, ids)
            expected = copy.deepcopy(model)(input_ids=ids, use_cache=False).logits
        assert_same_bits(logits, expected, f"logits of {tokens} tokens")


def test_is_decoder():
    assert hf.is_decoder(make_model("Llama"))
    assert not hf.is_decoder(torch.nn.Linear(2, 2))


def test_unknown_inputs_are_refused():
    embed = hf.decoder_layers(make_model("Llama"))[0][1]
    with pytest.raises(ValueError, match="remove labels"):
        embed({"input_ids": make_inputs("ids"), "labels": make_inputs("ids")})
    with pytest.raises(TypeError, match="input_ids"):
        embed(3)


def attention_inputs(dtype):
    q = torch.randn(2, 4, 16, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    return q, q[:, :2] * 0.5, q[:, 2:] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_half_attention_with_a_mask_is_fp32_rounded_once(family, dtype):
    attention = hf_attention.eager_attention if family == "Gemma2" else hf_attention.sdpa_attention
    module = make_model(family).model.layers[1].self_attn
    q, k, v = attention_inputs(dtype)
    mask = torch.zeros(16, 16).masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), float("-inf"))[None, None]
    truth, _ = attention(module, q.float(), k.float(), v.float(), mask, scaling=0.3)
    actual, _ = attention(module, q, k, v, mask.to(dtype), scaling=0.3)
    assert_same_bits(actual, truth.to(dtype), "attention output")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_attention_without_a_mask_is_as_exact(dtype):
    """The fused kernel adds in another order: a value half-way between two may round the other way."""
    module = make_model("Llama").model.layers[1].self_attn
    q, k, v = attention_inputs(dtype)
    for causal in (None, False):
        truth, _ = hf_attention.sdpa_attention(
            module, q.double(), k.double(), v.double(), None, scaling=0.3, is_causal=causal
        )
        plain = truth.float().to(dtype)
        actual, _ = hf_attention.sdpa_attention(module, q, k, v, None, scaling=0.3, is_causal=causal)
        assert_close_to_truth(actual, plain, truth, factor=1.0)


def test_attention_is_switched_only_from_torchs_own():
    model = make_model("Llama")
    hf.decoder_layers(model)
    assert model.config._attn_implementation == "spu"
    eager = make_model("Gemma2")
    eager.set_attn_implementation("eager")
    hf.decoder_layers(eager)
    assert eager.config._attn_implementation == "spu_eager"


@pytest.mark.parametrize("which", ["the whole", "the base", "each layer"])
def test_what_was_compiled_in_place_is_cut(which: str) -> None:
    """The proof compared compiled code with plain code, and took its rounding, or what a hook sees there, for wrong."""
    plain = make_model("Llama")
    model = copy.deepcopy(plain)
    for part in {"the whole": [model], "the base": [model.model], "each layer": model.model.layers}[which]:
        part.compile(backend="eager")
    compiled = {module: module._compiled_call_impl for module in model.modules()}
    layers = hf.decoder_layers(model)
    assert {module: module._compiled_call_impl for module in model.modules()} == compiled
    ids = make_inputs("ids")
    logits, _ = run_split(layers, ids)
    torch.testing.assert_close(logits, plain(ids).logits)
