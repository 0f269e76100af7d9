#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: under dynamic NTK scaling, logits depend on what the model saw before.
#
# Llama with rope_type "dynamic" and 16 positions. A text of 24 tokens is scored, then one of 64, then the first one
# again, without a cache: its logits are others. The rotary embedding keeps the tables of the longest sequence seen, and
# goes back only when a sequence is shorter than max_position_embeddings. So an evaluation depends on the order of its
# texts, in eval() and without any state that a checkpoint holds.
#
# Seen (largest difference of logits whose standard deviation is 2.68): before 0.0e+00, after 3.9e+00; after a text of
#       8 tokens 0.0e+00 again
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
config = LlamaConfig(**sizes, max_position_embeddings=16, rope_parameters=rope, initializer_range=0.5)
model = LlamaForCausalLM(config).eval()
text, longer, short = (torch.randint(64, (1, length)) for length in (24, 64, 8))


def score(ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


first = score(text)
before = (score(text) - first).abs().max().item()
score(longer)
after = (score(text) - first).abs().max().item()
score(short)
again = (score(text) - first).abs().max().item()
print(f"standard deviation {first.std().item():.2f}: before {before:.1e}, after {after:.1e}, again {again:.1e}")
assert before == again == 0
assert after > 0.1
PY
