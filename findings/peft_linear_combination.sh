#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0: add_weighted_adapter(combination_type="linear") is not the weighted sum of the adapters.
#
# An adapter changes a weight by B @ A, and one expects w1 * B1 @ A1 + w2 * B2 @ A2. "linear" adds the factors instead,
# (sqrt(w1) B1 + sqrt(w2) B2) @ (sqrt(w1) A1 + sqrt(w2) A2), so that each adapter's B also meets the other's A. For two
# unrelated adapters of one rank the cross terms are as large as the sum itself. "cat" is the weighted sum, for weights
# below 0 too, at the ranks' sum; "dare_linear" and "magnitude_prune" at density 1 are as "linear".
#
# Seen, error relative to the weighted sum, for weights 0.5 and 0.5; 1 and -1: linear 1.0; 1.0, cat 6e-08; 6e-08
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy peft==0.21.2 transformers==5.24.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), config, adapter_name="one")
model.add_adapter("two", config)
layer = model.base_model.model[0]


def error(kind, weights):
    name = f"{kind}_{len(model.peft_config)}"
    model.add_weighted_adapter(["one", "two"], list(weights), name, combination_type=kind)
    wanted = weights[0] * layer.get_delta_weight("one") + weights[1] * layer.get_delta_weight("two")
    return ((layer.get_delta_weight(name) - wanted).norm() / wanted.norm()).item()


for kind, low, high in (("linear", 0.5, 2.0), ("cat", 0.0, 1e-5)):
    mean, difference = error(kind, (0.5, 0.5)), error(kind, (1.0, -1.0))
    print(f"{kind}: mean {mean:.2g}, difference {difference:.2g}")
    assert low <= mean < high and low <= difference < high
PY
