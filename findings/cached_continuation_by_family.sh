#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: whether a model goes on from its own cache depends on the family, in three ways.
#
# model(ids[:, :7], use_cache=True), and model(ids[:, 7:], cache=...) with what it returned, should give the logits of
# model(ids): for scoring many ends of one beginning, turns of a chat, drafts that are checked. Attention-only families do, and of those
# with recurrent layers Falcon-H1, Granite-hybrid, LFM2, Qwen3-Next and Mamba2. Mamba, Falcon-Mamba, Jamba and MiniMax take several
# tokens at once as the beginning of a sequence, without the state that the cache holds; one at a time is right. Bamba and MiniMax count
# the new tokens' rotary positions from 0, unless position_ids are given. generate() is right: it gives position_ids, and one token
# at a time. And past_key_values=, the name of the same argument in most families, is taken by Mamba and means nothing.
#
# Seen, with the PyTorch forms of these layers that run where mamba_ssm is not installed, relative error of the logits after 7 tokens
# for one more, nine more, nine more with position_ids: Llama 4e-7, 2e-7, 2e-7; Falcon-H1 and Mamba2 alike; Mamba 2e-7, 5e-2, 5e-2;
# Falcon-Mamba 2e-7, 0.2, 0.2; Jamba 5e-7, 0.4, 0.4; Bamba 8e-2, 7e-2, 3e-7; MiniMax 8e-2, 0.6, 0.6, and 4e-7 for one more with
# position_ids; Mamba with past_key_values 0.6
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.24.0
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
common |= {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
heads = {"mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 4}
jamba = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4}
families = {  # options, and which of one token, nine, one and nine with position_ids are wrong
    "llama": ({}, []),
    "falcon_h1": ({"mamba_d_ssm": 32, "mamba_n_heads": 4, **heads}, []),
    "mamba2": ({"state_size": 4, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 4}, []),
    "mamba": ({"state_size": 4}, ["nine", "nine with positions"]),
    "falcon_mamba": ({"state_size": 4}, ["nine", "nine with positions"]),
    "jamba": (jamba, ["nine", "nine with positions"]),
    "bamba": ({"mamba_n_heads": 8, "attn_layer_indices": [1], **heads}, ["one", "nine"]),
    "minimax": (
        {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "block_size": 4},
        ["one", "nine", "nine with positions"],
    ),
}
generator = torch.Generator().manual_seed(0)
ids = torch.randint(5, 64, (1, 16), generator=generator)


def make(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**common, **families[family][0])).eval()
    for name, p in model.named_parameters():  # larger than the initial ones, so that layers count
        if p.dim() > 1:
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if "embed" in name else p.shape[-1] ** -0.5))
    return model


def error(model, count, positions, name="cache"):
    """Return the relative error of the logits of `count` tokens that follow 7 in the cache."""
    options = {name: model(input_ids=ids[:, :7], use_cache=True).cache}
    if positions:
        options["position_ids"] = torch.arange(7, 7 + count)[None]
    found = model(input_ids=ids[:, 7 : 7 + count], use_cache=True, **options).logits
    right = model(input_ids=ids[:, : 7 + count]).logits[:, 7:]
    return ((found - right).norm() / right.norm()).item()


with torch.no_grad():
    for family, (_, wrong) in families.items():
        model = make(family)
        errors = {"one": error(model, 1, False), "nine": error(model, 9, False)}
        errors |= {"one with positions": error(model, 1, True), "nine with positions": error(model, 9, True)}
        print(f"{family}: " + ", ".join(f"{name} {value:.0e}" for name, value in errors.items()))
        assert all(value > 3e-3 if name in wrong else value < 1e-4 for name, value in errors.items()), family
    ignored = error(make("mamba"), 1, False, name="past_key_values")
    print(f"mamba with past_key_values: {ignored:.1f}")
    assert ignored > 0.1
PY
