#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: a boolean 4D attention mask hides nothing under attn_implementation="eager".
#
# A mask of shape (batch, 1, queries, keys) goes to the attention as it is: for documents in one row, prefixes, trees. Under
# "sdpa" a boolean one means what it means in torch, True where a query may look. "eager", which one takes to have the
# attention weights or what a model's card advises, adds it to the scores: 1 for True and 0 for False. Nothing is
# hidden, not the other documents and not the future, since a causal mask is made only where none is given: a decoder
# trained so learns to copy its next token. Shapes, dtypes and losses look ordinary. An additive mask (0 and the lowest
# number) is right in both; 0 and 1 as floats are added in both.
#
# Seen, Llama, two documents of four tokens in one row, largest change of the first four tokens' logits when the last four
# are changed: sdpa boolean 0.0, additive 0.0; eager boolean 0.11, additive 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
document = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
allowed = ((document[:, None] == document) & torch.ones(8, 8).tril().bool())[None, None]
additive = torch.zeros(1, 1, 8, 8).masked_fill(~allowed, torch.finfo(torch.float32).min)


@torch.no_grad()
def leak(attention, mask):
    """Return how far the first document's logits move when the second one, which comes later, is changed."""
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    first, second, other = torch.randint(64, (3, 4))
    rows = torch.cat([first, second])[None], torch.cat([first, other])[None]
    one, two = (model(row, attention_mask=mask, use_cache=False).logits[:, :4] for row in rows)
    return (one - two).abs().max().item()


for attention in ("sdpa", "eager"):
    boolean, added = leak(attention, allowed), leak(attention, additive)
    print(f"{attention}: boolean {boolean:.2f}, additive {added:.2f}")
    assert added < 1e-6 and (boolean > 0.05) == (attention == "eager")
PY
