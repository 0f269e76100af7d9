#!/usr/bin/env bash
# torch 2.13.0, CPU: a 16-bit parameter's grad_dtype = torch.float32 does not survive a copy, and conversions half keep it.
#
# grad_dtype lets autograd put fp32 gradients beside 16-bit weights. copy.deepcopy and torch.save / torch.load make a
# parameter without it, whose gradients are 16-bit again. module.bfloat16() keeps the setting and converts the gradient,
# so that the gradient has the one dtype that the setting excludes. AdamW refuses such gradients, SGD takes them.
#
# Seen: deepcopy: grad_dtype float16; save and load: float16; bfloat16(): grad_dtype float32, gradient bfloat16; AdamW
# raises RuntimeError, SGD steps
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import copy
import io

import torch
from torch import nn


def layer():
    made = nn.Linear(2, 2, bias=False).half()
    made.weight.grad_dtype = torch.float32
    made(torch.ones(1, 2).half()).sum().backward()
    assert made.weight.grad.dtype == torch.float32
    return made


copied = copy.deepcopy(layer()).weight
print("deepcopy: grad_dtype", copied.grad_dtype)
assert copied.grad_dtype == torch.float16

file = io.BytesIO()
torch.save(layer(), file)
file.seek(0)
loaded = torch.load(file, weights_only=False).weight
print("saved and loaded: grad_dtype", loaded.grad_dtype)
assert loaded.grad_dtype == torch.float16

converted = layer().bfloat16().weight
print("bfloat16(): grad_dtype", converted.grad_dtype, "gradient", converted.grad.dtype)
assert converted.grad_dtype == torch.float32 and converted.grad.dtype == torch.bfloat16

torch.optim.SGD(layer().parameters(), lr=0.1).step()
try:
    torch.optim.AdamW(layer().parameters()).step()
except RuntimeError as error:
    print("AdamW:", error)
else:
    raise SystemExit("AdamW takes fp32 gradients of fp16 parameters now")
PY
