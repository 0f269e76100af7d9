#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: rows packed by restarting position_ids attend to each other by default.
#
# Llama, two sequences of four tokens in one row, position_ids 0 1 2 3 0 1 2 3. With use_cache=False the second sequence
# gives the same logits as by itself. With the default cache setting it does not, in train() too; and an attention_mask
# of ones, which says nothing more than its absence, makes them leak again even with use_cache=False.
#
# Seen (largest difference from the sequence by itself, and whether it leaks): default 7.5e-02; use_cache=False 0.0e+00;
#       mask of ones 7.5e-02; mask of ones and use_cache=False 7.5e-02
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).train()
one, two = torch.randint(32, (1, 4)), torch.randint(32, (1, 4))
packed, positions = torch.cat([one, two], 1), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
ones = torch.ones(1, 8, dtype=torch.long)
with torch.no_grad():
    alone = model(two).logits
    for name, extra, leaks in [
        ("default", {}, True),
        ("use_cache=False", {"use_cache": False}, False),
        ("mask of ones", {"attention_mask": ones}, True),
        ("mask of ones and use_cache=False", {"attention_mask": ones, "use_cache": False}, True),
    ]:
        logits = model(packed, position_ids=positions, **extra).logits[:, 4:]
        difference = (logits - alone).abs().max().item()
        print(f"{name}: {difference:.1e}")
        assert (difference > 1e-3) == leaks
PY
