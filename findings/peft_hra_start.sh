#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0: a Householder adapter (HRA) with apply_GS=True begins as another model than the base.
#
# HRA multiplies a weight by reflections, and begins with each of them twice, so that they cancel: the first outputs are the base
# model's. apply_GS=True makes the directions orthogonal by Gram-Schmidt. What is left of the second of two equal vectors is
# rounding, which is scaled to length 1: a reflection in a direction of noise that cancels nothing. So the fine-tuning begins with
# a weight that is turned about by r reflections; more directions destroy more.
#
# Seen, relative distance of the first outputs from the base model's, r = 2, 4, 8: without 9e-8, 2e-7, 1e-7; with
# apply_GS=True 0.62, 1.10, 1.03
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy peft==0.21.2 transformers==5.24.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import copy

import torch
from peft import HRAConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
x = torch.randn(64, 32)
for orthogonal in (False, True):
    for r in (2, 4, 8):
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(base), HRAConfig(target_modules=["0"], r=r, apply_GS=orthogonal))
        with torch.no_grad():
            distance = ((model(x) - base(x)).norm() / base(x).norm()).item()
        print(f"apply_GS={orthogonal}, r={r}: {distance:.1e}")
        assert distance > 0.2 if orthogonal else distance < 1e-5
PY
