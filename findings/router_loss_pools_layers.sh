#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: a mixture of experts' balance loss is at its minimum while every layer uses two
# experts.
#
# The load-balancing loss compares, for each expert, its share of the tokens and of the probabilities. One expects that of each
# layer, whose experts are the ones that idle, and a sum or mean over layers. load_balancing_loss_func puts the routers' logits
# of all layers together first, as if expert 3 of one layer and expert 3 of another were one. So layers that overload different
# experts cancel: with 4 experts, 2 a token and 2 layers, one that sends everything to experts 0 and 1 and one that sends it to
# 2 and 3 have the loss of perfect balance, and no gradient at the routers. Half of all experts get no token at all, and the
# number that is watched says that all is well. Mixtral, Qwen2-MoE, OLMoE and others have the same function.
#
# Seen, loss (2 is the least, 4 the most): both layers to experts 0 and 1 4.00; one to 0 and 1, one to 2 and 3 2.00, where the
# mean of the layers' own losses is 4.00; with softer routers, loss and largest gradient: the same experts 2.91, 3.7e-3;
# different ones 2.00, 7.7e-10. A Mixtral's aux_loss is this number
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


def to_pair(first, size):
    """Return a router's logits for 64 tokens that all choose experts first and first + 1 of 4, with some spread."""
    logits = 0.1 * size * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    logits[:, first : first + 2] += size
    return logits.requires_grad_()


def judged(name, *layers):
    """Return the loss, the mean of the layers' own losses, and the largest gradient at the first router."""
    loss = load_balancing_loss_func(layers, num_experts=4, top_k=2)
    own = sum(load_balancing_loss_func((layer,), num_experts=4, top_k=2).item() for layer in layers) / len(layers)
    (gradient,) = torch.autograd.grad(loss, layers[0])
    found = loss.item(), own, gradient.abs().max().item()
    print(f"{name}: loss {found[0]:.4f}, mean of the layers' own {found[1]:.4f}, largest gradient {found[2]:.1e}")
    return found


for size, most in ((20.0, 3.99), (1.0, 2.5)):
    same = judged(f"logits of {size}, the same experts", to_pair(0, size), to_pair(0, size))
    other = judged(f"logits of {size}, different experts", to_pair(0, size), to_pair(2, size))
    assert min(same[:2]) > most and other[1] > most and abs(other[0] - 2) < 0.01
assert same[2] > 1e-3 and other[2] < same[2] / 20

torch.manual_seed(0)
shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
model = MixtralForCausalLM(MixtralConfig(vocab_size=50, num_local_experts=4, num_experts_per_tok=2, **shape))
with torch.no_grad():
    output = model(input_ids=torch.arange(48).view(1, 48), output_router_logits=True)
pooled = load_balancing_loss_func(output.router_logits, 4, 2)
print("a model's aux_loss", output.aux_loss.item(), "all layers together", pooled.item())
assert len(output.router_logits) == 2 and torch.allclose(output.aux_loss, pooled)
PY
