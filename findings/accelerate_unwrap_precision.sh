#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.13.0: unwrap_model() in one form keeps autocast, and in the other ends it for the training.
#
# With mixed_precision="bf16" and one process, what prepare() returns is the model itself, with a forward that runs under
# autocast. One expects unwrap_model() to hand out the plain model, and to leave the prepared one as it is. By default it hands
# out the one that runs in bf16, so an evaluation "in fp32" of the unwrapped model is none. With keep_fp32_wrapper=False the
# plain forward is put back into the only model there is: a save or a look at it in the midst of a training has all further
# steps run in fp32, slower and in more memory. Nothing says so. save_model() and get_state_dict() leave it alone.
#
# Seen, dtype in which a linear layer computes: prepared bfloat16; what unwrap_model() returns bfloat16; after save_model()
# bfloat16; the prepared model after unwrap_model(model, keep_fp32_wrapper=False) float32
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cat > "$folder/unwrap.py" <<'PY'
import sys

import torch
from accelerate import Accelerator


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x):
        y = self.layer(x)
        self.computed = str(y.dtype)
        return y


def computes(model):
    """Return the dtype in which the model's layer computes, and check its output's."""
    assert model(torch.ones(1, 2)).dtype == torch.float32 or model.computed == "torch.bfloat16"
    return model.computed


accelerator = Accelerator(cpu=True, mixed_precision="bf16")
model = accelerator.prepare(Model())
prepared = computes(model)
unwrapped = computes(accelerator.unwrap_model(model))
accelerator.save_model(model, sys.argv[1])
saved = computes(model)
accelerator.unwrap_model(model, keep_fp32_wrapper=False)
after = computes(model)
print("prepared", prepared, "unwrapped", unwrapped, "after save_model", saved, "after keep_fp32_wrapper=False", after)
assert (prepared, unwrapped, saved, after) == ("torch.bfloat16", "torch.bfloat16", "torch.bfloat16", "torch.float32")
PY
"$folder/venv/bin/python" -W ignore "$folder/unwrap.py" "$folder/saved" 2>/dev/null
