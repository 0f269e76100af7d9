#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: whether packed rows are kept apart depends on the family, and nothing says so.
#
# Two sequences of four tokens in one row, position_ids 0 1 2 3 0 1 2 3, no attention_mask, use_cache=False: GPT-2 and
# GPT-NeoX give the second sequence the logits that it has by itself. OPT takes the same position_ids and uses them for
# its embeddings, but the second sequence attends to the first: no error, no warning.
#
# Seen (largest difference from the sequence by itself): GPT2 0.0e+00, GPTNeoX 0.0e+00, OPT 6.7e-02
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, OPTConfig

sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
torch.manual_seed(0)
one, two = torch.randint(2, 32, (1, 4)), torch.randint(2, 32, (1, 4))
packed, positions = torch.cat([one, two], 1), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
for name, config, leaks in [
    ("GPT2", GPT2Config(**sizes), False),
    ("GPTNeoX", GPTNeoXConfig(**sizes, intermediate_size=32), False),
    ("OPT", OPTConfig(**sizes, ffn_dim=32, word_embed_proj_dim=16, pad_token_id=1), True),
]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        alone = model(two, use_cache=False).logits
        logits = model(packed, position_ids=positions, use_cache=False).logits[:, 4:]
    difference = (logits - alone).abs().max().item()
    print(f"{name}: {difference:.1e}")
    assert (difference > 1e-3) == leaks
PY
