#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0: an OFT adapter on a convolution changes the model before it is trained, and differs merged.
#
# OFT turns what goes into a layer, and begins with no turn: outputs are those of the base model, as they are for linear layers. On
# an nn.Conv2d the input is cut into windows, turned, and put together again by torch's fold. fold adds windows where they
# overlap, so that an inner pixel of a 3 x 3 kernel comes back nine times; and it is given the windows' values in another order
# than it reads, so that they come back in other places. The turn that is merged into the weight knows nothing of either:
# merge_and_unload() of an adapter that has learnt nothing is the base model, and of a trained one it is not the model that was
# trained. Nothing is said. Kernels of 1 x 1 are right, and so are LoRA, HRA and IA3 on the same layer.
#
# Seen, largest difference from the base model's outputs (1.7 at most) with a new adapter, after merging it, and of a trained
# one merged and unmerged: 3 x 3 7, 0, 7; 1 x 1 0, 0, 2e-07; a linear layer 0, 0, 1e-07; LoRA on 3 x 3 0, 0, 4e-07; what a new
# adapter makes of an image of ones: 1 in the corners, 9 inside
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy peft==0.21.2 transformers==5.24.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import copy

import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from torch import nn

torch.manual_seed(0)


def differences(name, layer, x, config):
    """Return how far a new adapter, a new one merged, and a trained one merged are from what they should be."""
    base = nn.Sequential(layer)
    plain = base(x).detach()
    model = get_peft_model(copy.deepcopy(base), config)
    new = (model(x) - plain).abs().max().item()
    merged = (copy.deepcopy(model).merge_and_unload()(x) - plain).abs().max().item()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    trained = model(x).detach()
    apart = (copy.deepcopy(model).merge_and_unload()(x) - trained).abs().max().item()
    print(f"{name}: outputs up to {plain.abs().max():.1f}; new {new:.1g}, merged {merged:.1g}; trained, merged {apart:.1g}")
    return new, merged, apart


def oft():
    return OFTConfig(target_modules=["0"], oft_block_size=4)


image = torch.randn(2, 4, 8, 8)
three = differences("3 x 3", nn.Conv2d(4, 4, 3, padding=1), image, oft())
one = differences("1 x 1", nn.Conv2d(4, 4, 1), image, oft())
linear = differences("linear", nn.Linear(16, 8), torch.randn(2, 16), oft())
lora = differences("LoRA, 3 x 3", nn.Conv2d(4, 4, 3, padding=1), image, LoraConfig(target_modules=["0"], r=4))

model = get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), oft())
turned = model.base_model.model[0].oft_R["default"](torch.ones(1, 4, 8, 8))
print(f"an image of ones becomes {turned[0, 0, 0, 0]:.0f} in the corner, {turned[0, 0, 4, 4]:.0f} inside")

assert three[0] > 1 and three[1] < 1e-5 and three[2] > 1
assert max(one + linear + lora) < 1e-5
assert turned[0, 0, 0, 0] == 1 and turned[0, 0, 4, 4] == 9
PY
