#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0: lora_dropout does nothing on an embedding.
#
# A LoRA's dropout drops parts of what goes into the adapter. An embedding's adapter has a dropout module like the others, in
# the model's printout too, and never calls it: with lora_dropout=0.9 two forwards in train() are equal to the last bit,
# and equal to one in eval(). Adapters of linear and of convolution layers drop. So of one config's adapters those of the
# embedding are trained without it, and nothing says so.
#
# Seen, two forwards of a layer with lora_dropout=0.9 in train(): nn.Embedding equal, nn.Linear and nn.Conv1d different
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
# So many values that dropout cannot drop all of them, or the same ones twice.
INPUTS = {nn.Embedding(11, 8): torch.arange(11), nn.Linear(8, 8): torch.ones(99, 8), nn.Conv1d(4, 8, 3): torch.ones(99, 4, 9)}

for layer, x in INPUTS.items():
    config = LoraConfig(target_modules=["0"], lora_dropout=0.9, r=4, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(layer), config).train()
    dropout = model.base_model.model[0].lora_dropout["default"]
    first = model(x)
    equal = torch.equal(first, model(x))
    assert torch.equal(first, model.eval()(x)) == equal
    model.train()
    print(f"{type(layer).__name__}: has {dropout}; two forwards equal: {equal}; adapted: {not torch.equal(model(x), layer(x))}")
    assert isinstance(dropout, nn.Dropout) and dropout.p == 0.9 and dropout.training
    assert equal == isinstance(layer, nn.Embedding)
PY
