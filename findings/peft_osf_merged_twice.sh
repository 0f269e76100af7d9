#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0: an OSF adapter that is merged, and then merged and unloaded, is in the weights twice.
#
# merge_adapter() for a faster evaluation, merge_and_unload() at the end for the file: a LoRA that is merged already is left as
# it is the second time. Orthogonal subspace fine-tuning (OSF), which splits a weight into a frozen and a trained part of its
# singular values, merges the trained difference again, so the exported weights are neither the base's nor the trained ones.
# merge_adapter() alone is right, and so is merge_and_unload() alone; unmerge_adapter() between them is refused by name. Nothing
# else is said.
#
# Seen, largest difference of the outputs from those of the trained adapter, training moved them by 0.38: OSF merge_adapter
# 1e-7, merge_and_unload 1e-7, one after the other 0.43; LoRA 1e-7 in all three
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
HF_HOME="$folder/home" "$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import copy

import torch
from peft import LoraConfig, OSFConfig, get_peft_model
from torch import nn

x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def apart(model, outputs):
    return (model(x) - outputs).abs().max().item()


for config, right in ((LoraConfig(target_modules=["0", "2"]), True), (OSFConfig(target_modules=["0", "2"]), False)):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), config)
    begin = model(x).detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    trained, moved = model(x).detach(), apart(model, begin)

    merged, unloaded = copy.deepcopy(model), copy.deepcopy(model).merge_and_unload()
    merged.merge_adapter()
    found = [apart(merged, trained), apart(unloaded, trained), apart(merged.merge_and_unload(), trained)]
    print(f"{type(config).__name__}: moved by {moved:.2g}; merged {found[0]:.1g}, unloaded {found[1]:.1g}, both {found[2]:.2g}")
    assert max(found[:2]) < 1e-5 < 0.02 < moved and (found[2] < 1e-5) == right
    assert right or found[2] > moved / 4
PY
