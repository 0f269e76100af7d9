"""Adapters put into a decoder, and files of adapters that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from spu.model.lora import CONFIG, WEIGHTS, LoraOptions, add_adapters, read_adapter  # noqa: E402


def decoder() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def written(folder: Path, **options: Any) -> Path:
    add_adapters(decoder(), LoraOptions(rank=2, **options)).save_pretrained(folder)
    return folder


def test_every_linear_layer_of_the_blocks_is_adapted_and_the_rest_frozen() -> None:
    base = decoder()
    blocks = {f"base_model.model.{n}" for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    model = add_adapters(base, LoraOptions(rank=2))
    assert {n for n, m in model.named_modules() if hasattr(m, "lora_A")} == blocks
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())
    assert model.peft_config["default"].lora_alpha == 4


def test_first_values_are_a_function_of_the_seed_alone_and_change_no_output() -> None:
    ids = torch.randint(32, (1, 5))
    plain = decoder().eval()(ids).logits
    base, state = decoder(), torch.get_rng_state()
    first = add_adapters(base, LoraOptions(rank=2, targets=("q_proj",), kind="dora"), seed=3).eval()
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's draws have moved
    again = add_adapters(decoder(), LoraOptions(rank=2, targets=("q_proj",), kind="rslora"), seed=3)
    torch.testing.assert_close(first(ids).logits, plain)
    a, b = (m.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").lora_A.default for m in (first, again))
    assert torch.equal(a.weight, b.weight)


def test_an_unknown_target_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no layer of LlamaForCausalLM is named 'c_attn': there are down_proj, gate"):
        add_adapters(decoder(), LoraOptions(rank=2, targets=("q_proj", "c_attn")))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot have these adapters: .*LlamaRMSNorm"):
        add_adapters(decoder(), LoraOptions(rank=2, targets=("input_layernorm",)))


def test_an_adapter_is_read_as_peft_wrote_it(tmp_path: Path) -> None:
    config, tensors = read_adapter(written(tmp_path, kind="dora"))
    assert config["use_dora"]
    assert len(tensors) == 2 * 7 * 3
    assert tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (2, 8)


def broken(folder: Path, how: str) -> None:
    values = json.loads((folder / CONFIG).read_text())
    weights = (folder / WEIGHTS).read_bytes()
    if how == "no config":
        (folder / CONFIG).unlink()
    elif how == "half a config":
        (folder / CONFIG).write_text('{"peft_type": "LO')
    elif how == "another kind":
        (folder / CONFIG).write_text(json.dumps({**values, "peft_type": "IA3"}))
    elif how == "rank 0":
        (folder / CONFIG).write_text(json.dumps({**values, "r": 0}))
    elif how == "no weights":
        (folder / WEIGHTS).unlink()
    else:
        (folder / WEIGHTS).write_bytes(weights[: len(weights) // 2])


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("no config", r"has no adapter_config.json: give a folder"),
        ("half a config", r"adapter_config.json cannot be read \("),
        ("another kind", r"is of peft_type 'IA3': only LORA"),
        ("rank 0", r"has rank r = 0: an adapter's is 1 or more"),
        ("no weights", r"has no adapter_model.safetensors"),
        ("cut", r"adapter_model.safetensors is damaged \("),
    ],
)
def test_a_broken_adapter_is_named(how: str, text: str, tmp_path: Path) -> None:
    broken(written(tmp_path), how)
    with pytest.raises(ValueError, match=text):
        read_adapter(tmp_path)
