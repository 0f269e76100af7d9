"""The attention that accelerated 16-bit transformers models get: every keyword, caches, parts of a model, masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from numeric import assert_close_to_truth, assert_equal
from torch import nn

import spu
from spu.nn import attention

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": 0, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "head_dim": 8,
}  # fmt: skip
HALF = [torch.float16, torch.bfloat16]


def models(family: str, dtype: torch.dtype, implementation: str | None = None) -> tuple[Any, Any, Any]:
    """(accelerated, plain, fp32) copies of a small random model."""
    config = getattr(transformers, f"{family}Config")(**SMALL)
    encoder_decoder = family in ("T5", "MT5", "UMT5")
    kind = transformers.AutoModelForSeq2SeqLM if encoder_decoder else transformers.AutoModelForCausalLM
    options = {} if implementation is None else {"attn_implementation": implementation}
    plain = kind.from_config(config, **options).eval()
    for name, p in plain.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(p)
    plain = plain.to(dtype)
    return spu.accelerate(copy.deepcopy(plain)), plain, copy.deepcopy(plain).float()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_position_bias_is_no_keyword_to_drop(dtype: torch.dtype, implementation: str, padded: bool) -> None:
    """T5 hands its bias over by keyword: it was lost without a mask, and crashed with one."""
    ids = torch.randint(5, 64, (2, 9))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, -3:] = 0
    results = []
    for model in models("T5", dtype, implementation):
        logits = model(input_ids=ids, attention_mask=mask if padded else None, decoder_input_ids=ids[:, :7]).logits
        logits.float().square().mean().backward()
        bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        results.append((logits.detach(), bias.grad))
    for ours, plain, truth in zip(*results):
        assert_close_to_truth(ours, plain, truth)


def test_an_unknown_keyword_goes_to_torchs_own_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def theirs(module: Any, q: Any, k: Any, v: Any, mask: Any, **keywords: Any) -> Any:
        seen.append((q.dtype, keywords))
        return q, None

    monkeypatch.setattr("transformers.integrations.sdpa_attention.sdpa_attention_forward", theirs)
    q = torch.randn(1, 2, 3, 8).half()
    for known in ({"scaling": 0.5, "sliding_window": 4, "position_bias": None, "use_cache": True}, {}):
        attention.sdpa_attention(nn.Identity(), q, q, q, None, **known)
    assert not seen
    for unknown in ({"s_aux": torch.ones(2)}, {"position_bias": q[..., :3]}, {"softcap": 3.0}, {"anything": 1}):
        attention.sdpa_attention(nn.Identity(), q, q, q, None, **unknown)
        assert seen.pop() == (torch.float16, unknown)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPT2", "GPTNeoX", "T5"])
def test_generation(family: str, dtype: torch.dtype, cache: str) -> None:
    """An empty static cache has more keys than queries, which the fused attention refused."""
    ids = torch.randint(5, 64, (2, 9))
    for mask in (torch.ones_like(ids), torch.ones_like(ids).index_fill(1, torch.arange(2), 0)):
        logits = [
            model.generate(
                ids, attention_mask=mask, max_new_tokens=3, do_sample=False, cache_implementation=cache,
                return_dict_in_generate=True, output_logits=True, disable_compile=True,
            ).logits[0].float()
            for model in models(family, dtype)
        ]  # fmt: skip
        assert_close_to_truth(*logits, eps=2 * torch.finfo(dtype).eps * float(logits[2].abs().max()))


def test_a_static_cache_by_hand() -> None:
    ids = torch.randint(5, 64, (2, 6))
    results = []
    for model in models("Llama", torch.bfloat16):
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        first = model(input_ids=ids, past_key_values=cache).logits
        results.append((first.detach(), model(input_ids=ids[:, :1], past_key_values=cache).logits.detach()))
    for ours, plain, truth in zip(*results):
        assert_close_to_truth(ours, plain, truth)


def test_a_model_that_asks_for_its_attention_by_name_keeps_it() -> None:
    """DeepSeek's sparse attention puts its mask together under the names "sdpa" and "eager" alone."""
    assert not attention._names_asked_for("transformers.models.llama.modeling_llama") & {"sdpa", "eager"}
    assert "eager" in attention._names_asked_for("transformers.models.gpt2.modeling_gpt2")
    ours, plain, _ = models("GPT2", torch.float16, "eager")
    assert ours.config._attn_implementation == "eager"
    ids = torch.randint(5, 64, (2, 9))
    home = "transformers.models.deepseek_v32.modeling_deepseek_v32"
    if hasattr(transformers, "DeepseekV32Config"):
        __import__(home)
        assert {"sdpa", "eager"} <= attention._names_asked_for(home)
    assert ours(input_ids=ids).logits.shape == plain(input_ids=ids).logits.shape


def test_every_part_of_a_model_has_its_own_attention_and_gets_it_back() -> None:
    """One name was set for all parts, and one was put back."""
    vision = transformers.SiglipVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                             num_attention_heads=4, image_size=28, patch_size=14)  # fmt: skip
    text = transformers.LlamaConfig(**SMALL)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    model = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation={"": "sdpa", "text_config": "eager", "vision_config": "sdpa"}
    )
    assert model.config.text_config._attn_implementation == "eager"
    spu.accelerate(model)
    assert model.config.vision_config._attn_implementation == "spu"
    assert model.config.text_config._attn_implementation == "spu_eager"
    spu.restore(model)
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "eager"


@pytest.mark.parametrize("dtype", HALF)
def test_a_row_that_sees_nothing_is_as_in_plain_torch(dtype: torch.dtype) -> None:
    """All its keys hidden by the lowest number, a row is their mean; widened, the mask must be the lowest of fp32."""
    transformers_eager = transformers.models.llama.modeling_llama.LlamaAttention
    module = transformers_eager(transformers.LlamaConfig(**SMALL), 0)
    q, k, v = (torch.randn(2, heads, 5, 8).to(dtype) * 3 for heads in (4, 2, 2))
    mask = torch.zeros(2, 1, 5, 5, dtype=dtype).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(), -torch.inf)
    mask = mask.clamp(min=torch.finfo(dtype).min)
    out, weights = attention.eager_attention(module, q, k, v, mask, scaling=0.35)
    assert out.dtype == weights.dtype == dtype
    torch.testing.assert_close(out[:, 0].float(), v.float().mean(2).repeat_interleave(2, 1), rtol=0.02, atol=0.02)


def test_autocast_does_not_narrow_what_was_widened() -> None:
    module = nn.Identity()
    q, mask = torch.randn(1, 2, 5, 8).bfloat16(), torch.ones(5, 5, dtype=torch.bool).tril()
    expected = attention.sdpa_attention(module, q, q, q, mask)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(attention.sdpa_attention(module, q, q, q, mask)[0], expected)


@pytest.mark.parametrize("masked", [False, True])
def test_transformers_gets_heads_that_torchs_fast_kernels_take(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 on a CPU goes the way of a GPU's tensors. Before Ampere, heads are not shared; a mask's are not, anyway."""
    asked: list[int] = []

    def unshared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(k.shape[1])
        return k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)

    plain = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL)).eval()
    ours = spu.accelerate(copy.deepcopy(plain))
    ids = torch.randint(5, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    given = {"attention_mask": mask} if masked else {}
    expected, truth = (m(input_ids=ids, **given).logits for m in (plain, copy.deepcopy(plain).double()))
    monkeypatch.setattr(attention, "unshared_heads", unshared)
    attention.use_attention(ours)
    assert_close_to_truth(ours(input_ids=ids, **given).logits, expected, truth)
    assert asked == ([] if masked else [2, 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_bool_mask_is_made_into_numbers_once_for_all_layers(dtype: torch.dtype, heads: int) -> None:
    """torch makes and keeps new ones in every call (findings/sdpa_bool_mask_copies.sh)."""
    module = nn.Module()
    module.num_key_value_groups = 1  # type: ignore[assignment]
    mask = (torch.rand(2, heads, 9, 9) < 0.5) | torch.eye(9, dtype=torch.bool)
    q = torch.randn(2, 2, 9, 8, dtype=dtype, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.extend([t] if t.shape == mask.shape and t.dtype.is_floating_point else [])
        return t

    with torch.inference_mode():
        attention.sdpa_attention(module, q, q, q, mask, scaling=0.3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outs = [attention.sdpa_attention(module, q, q, q, mask, scaling=0.3)[0] for _ in range(3)]
    assert len(kept) == 3
    assert len({t.untyped_storage().data_ptr() for t in kept}) == 1
    wide = q.float() if dtype == torch.float16 else q
    plain = torch.nn.functional.scaled_dot_product_attention(wide, wide, wide, mask, scale=0.3).transpose(1, 2)
    for out in outs:
        assert_equal(out, plain.to(dtype))
    mask[0, 0, 5, :5] = False  # in place
    plain = torch.nn.functional.scaled_dot_product_attention(wide, wide, wide, mask, scale=0.3).transpose(1, 2)
    assert_equal(attention.sdpa_attention(module, q, q, q, mask, scaling=0.3)[0], plain.to(dtype))
