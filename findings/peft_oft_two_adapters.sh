#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0: two OFT adapters that are active together are another model once they are merged.
#
# OFT turns what goes into a layer, and turns do not commute. Unmerged, the layer applies the first adapter to its input and then
# the second; merging turns the weight by the first and what comes of that by the second, which is the other order. One expects
# merge_adapter() to change nothing but the speed, as it does for one adapter, and for two of BOFT, HRA, LoRA and (IA)^3.
# merge_and_unload(adapter_names=["second", "first"]) gives the model that ran.
#
# Seen, trained turns of two adapters, relative distance of merged outputs from unmerged ones: one OFT 2e-7; two 1.2; two in
# the other order 2e-7; two of BOFT 2e-7
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy peft==0.21.2 transformers==5.24.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import copy

import torch
from peft import BOFTConfig, OFTConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
x = torch.randn(64, 32)


@torch.no_grad()
def distance(make, names, order):
    """Merge `names`, all active, in the given order; return the relative change of the outputs."""
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), make(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, make())
    for name, p in model.named_parameters():
        if any(f".{adapter}" in name for adapter in names):
            p.add_(0.3 * torch.randn_like(p))
    model.base_model.set_adapter(names)
    model.eval()
    before = model(x)
    after = model.merge_and_unload(adapter_names=order)(x)
    return ((after - before).norm() / before.norm()).item()


def oft():
    return OFTConfig(target_modules=["0"], oft_block_size=8, r=0, use_cayley_neumann=False)


def boft():
    return BOFTConfig(target_modules=["0"], boft_block_size=8)


one = distance(oft, ["first"], ["first"])
two = distance(oft, ["first", "second"], ["first", "second"])
turned = distance(oft, ["first", "second"], ["second", "first"])
other = distance(boft, ["first", "second"], ["first", "second"])
print(f"OFT: one {one:.1e}, two {two:.1e}, two merged in the other order {turned:.1e}; two of BOFT {other:.1e}")
assert max(one, turned, other) < 1e-4 and two > 0.1
PY
