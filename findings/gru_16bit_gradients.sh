#!/usr/bin/env bash
# torch 2.13.0, CPU: in 16 bits the recurrent weights of a GRU or an RNN get wrong gradients; those of the inputs are right.
#
# nn.GRU and nn.RNN multiply all time steps by weight_ih at once, and by weight_hh one step after the other. So the gradient of
# weight_ih is one product, added up in fp32, and that of weight_hh and bias_hh is a sum over time that autograd makes in the weight's
# own dtype: it stops growing where a step's share is below half a unit of it. Outputs are right, and half of the layer's
# parameters are, so nothing hints at it; longer sequences make it worse. Under autocast the fp32 weight is cast once
# for the call, and its gradient is added up in 16 bits as well. Splitting a sequence into pieces (truncated
# backpropagation) gives each piece a sum of its own. weight.grad_dtype = torch.float32 makes each addition in fp32, and helps. nn.LSTM
# in bf16 is right where oneDNN's fused kernel takes it.
#
# Seen, 4,000 steps, relative error of the gradients of weight_ih, weight_hh, bias_hh: GRU bf16 1.7e-3, 0.86, 0.89; fp16 2e-4,
# 0.23, 0.20; RNN bf16 1.7e-3, 0.86, 0.89; fp16 2e-4, 0.22, 0.19; GRU in fp32 below 1e-5; GRU in bf16
# with grad_dtype fp32 2e-3, 4e-4, 3e-4; GRU under autocast to bf16 1.7e-3, 0.86, 0.89
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import copy

import torch
from torch import nn

torch.set_num_threads(1)


def errors(kind, dtype, autocast=False, grad_dtype=None):
    """Return the relative errors of the output and of three gradients, against the same values in fp64."""
    torch.manual_seed(0)
    layer = kind(8, 8, batch_first=True).to(dtype)
    for p in layer.parameters():
        p.grad_dtype = grad_dtype or dtype
    if autocast:  # weights that bf16 holds, so that only sums differ
        for p in layer.parameters():
            p.data = p.data.bfloat16().float()
    wide = copy.deepcopy(layer).double()
    x = torch.rand(2, 4000, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x.to(dtype))[0]
    truth = wide(x.double())[0]
    y.sum().backward()
    truth.sum().backward()
    names = "weight_ih_l0", "weight_hh_l0", "bias_hh_l0"
    pairs = [(y, truth)] + [(getattr(layer, name).grad, getattr(wide, name).grad) for name in names]
    return [((found.double() - right).norm() / right.norm()).item() for found, right in pairs]


for kind in (nn.GRU, nn.RNN):
    for dtype in (torch.bfloat16, torch.float16):
        output, inputs, recurrent, bias = errors(kind, dtype)
        print(f"{kind.__name__} {dtype}: output {output:.1e}, weight_ih {inputs:.1e}, weight_hh {recurrent:.2f}, bias_hh {bias:.2f}")
        assert output < 0.01 and inputs < 0.01 and min(recurrent, bias) > 0.1
wide = errors(nn.GRU, torch.float32)
print("GRU torch.float32:", ", ".join(f"{error:.1e}" for error in wide))
helped = errors(nn.GRU, torch.bfloat16, grad_dtype=torch.float32)
print("GRU torch.bfloat16, grad_dtype fp32:", ", ".join(f"{error:.1e}" for error in helped))
cast = errors(nn.GRU, torch.float32, autocast=True)
print("GRU under autocast to bf16:", ", ".join(f"{error:.1e}" for error in cast))
assert max(wide) < 1e-3 and max(helped) < 0.01 and cast[1] < 0.02 and min(cast[2:]) > 0.1
PY
