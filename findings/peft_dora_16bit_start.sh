#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0: a DoRA adapter that has not been trained changes a 16-bit model; a LoRA does not.
#
# An adapter begins as no change: B is 0, and DoRA's magnitudes are the norms of the weight, by which it divides. With bf16 base
# weights the magnitudes are kept in fp32, but what they are divided by is rounded to bf16 in each forward. So each column of
# outputs has a factor of its own, up to 0.5% off 1, before the first step already; merging puts it into the weights. The loss
# before training is not that of the base model, and merging an adapter that has learnt nothing makes another checkpoint.
#
# Seen, a layer of 512 x 512: weights changed by a merge right after get_peft_model, and the factors: bf16 15%, 0.995 to 1.005;
# fp16 16%, 0.9995 to 1.0006; fp32 none, 1; LoRA none in any of them
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy peft==0.21.2 transformers==5.24.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
linear, rows = nn.Sequential(nn.Linear(512, 512, bias=False)), torch.randn(64, 512)


def fresh(dtype, dora):
    """Return the share of weights that a merge changes, and the smallest and largest factor of an output's column."""
    base, x = copy.deepcopy(linear).to(dtype), rows.to(dtype)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["0"], use_dora=dora, r=8))
    with torch.no_grad():
        before, after = base(x).double(), model(x).double()
    merged = model.merge_and_unload()
    changed = (merged[0].weight != base[0].weight).double().mean().item()
    factors = (after * before).sum(0) / before.square().sum(0)
    print(f"{dtype} dora {dora}: changed by a merge {changed:.1%}, factors {factors.min():.5f} to {factors.max():.5f}")
    return changed, factors.min().item(), factors.max().item()


for dtype, least in ((torch.bfloat16, 2e-3), (torch.float16, 3e-4)):
    changed, smallest, largest = fresh(dtype, dora=True)
    assert changed > 0.05 and smallest < 1 - least and largest > 1 + least
for dtype, dora in ((torch.float32, True), (torch.bfloat16, False), (torch.float16, False)):
    changed, smallest, largest = fresh(dtype, dora)
    assert changed == 0 and largest - smallest < 1e-6
PY
