#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: whether a left-padded row is scored right depends on the family, and nothing says so.
#
# model(input_ids, attention_mask), four pads before twelve tokens: the pads are hidden by the mask everywhere. Positions are
# another matter. OPT counts them from the mask, BLOOM's distances and rotary ones (Llama, GPT-J) do not change, and the logits
# are those of the row alone. GPT-2, GPT-Neo, GPTBigCode, CTRL, XGLM and BioGPT number the pads as well, so that every token stands four
# places further on than alone, and the loss of a left-padded batch is another one. (BioGPT has code that counts from the mask; its
# caller gives it positions, so that it never runs.) RWKV takes no attention_mask: pads go through
# its state. generate() is right, since it gives position_ids; tokenizers set up for it pad on the left in training too.
#
# Seen, relative error of the logits: Llama, GPT-J, OPT, BLOOM below 1e-6; GPT-2 0.9, GPT-Neo 1.1, GPTBigCode 1.0, CTRL 0.5, XGLM 0.4,
# BioGPT 0.4, RWKV 0.6; with position_ids 0 to 11 after the pads GPT-2, GPT-Neo, GPTBigCode below 1e-6
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.24.0
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

common = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
usual = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
usual |= {"max_position_embeddings": 64}
short = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
neo = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 64}
families = {
    "llama": (usual, True),
    "gptj": ({**short, "rotary_dim": 4}, True),
    "opt": ({**usual, "ffn_dim": 48, "word_embed_proj_dim": 32}, True),
    "bloom": ({"hidden_size": 32, "n_head": 4, "n_layer": 2}, True),
    "gpt2": (short, False),
    "gpt_neo": ({**usual, **neo}, False),
    "gpt_bigcode": (short, False),
    "ctrl": ({**short, "dff": 48}, False),
    "xglm": ({"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}, False),
    "biogpt": (usual, False),
    "rwkv": ({"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}, False),
}
generator = torch.Generator().manual_seed(0)
ids = torch.randint(5, 64, (1, 12), generator=generator)
pads = torch.zeros(1, 4, dtype=torch.long)
padded, mask = torch.cat([pads, ids], 1), torch.cat([pads, torch.ones_like(ids)], 1)
positions = (mask.cumsum(1) - 1).clamp(min=0)


def error(found, right):
    return ((found[:, 4:] - right).norm() / right.norm()).item()


with torch.no_grad():
    for family, (options, expected) in families.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**common, **options)).eval()
        for p in model.parameters():  # larger than the initial ones, so that positions and layers count
            if p.dim() > 1:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        alone = model(input_ids=ids).logits
        left = error(model(input_ids=padded, attention_mask=mask).logits, alone)
        print(f"{family}: {left:.0e}")
        assert left < 1e-4 if expected else left > 0.02, family
        if family in ("gpt2", "gpt_neo", "gpt_bigcode"):
            given = error(model(input_ids=padded, attention_mask=mask, position_ids=positions).logits, alone)
            print(f"{family} with position_ids: {given:.0e}")
            assert given < 1e-4
PY
