#!/usr/bin/env bash
# torch 2.13.0: torch.optim.Adafactor on bf16 weights is no Adafactor below a gradient of 0.008: its steps follow the gradient.
#
# Adafactor divides a gradient by the root of its own second moment, so that steps do not depend on the loss's scale. torch's
# keeps the divisor from being less than eps1, and by default eps1 is the precision of the weight's dtype: 1.2e-7 in fp32, but
# 9.8e-4 in fp16 and 7.8e-3 in bf16. Language models' gradients are smaller than that. Below it the divisor is constant: the
# optimizer is a plain gradient descent with 128 times the rate, and a loss divided by 10 trains a tenth as fast. eps1=1e-30
# is the paper's and transformers' value. In fp32 the default does no harm.
#
# Seen, size of the first step relative to that of gradients of size 1, for gradients of 1e-1, 1e-2, 1e-3, 1e-4: fp32 1 1 1 1,
# fp16 1 1 1 0.1, bf16 1 1 0.13 0.013; bf16 with eps=(1e-30, 1e-3): 1 1 1 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch

gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


def step_size(dtype, scale, **options):
    weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    weight.grad = (gradient * scale).to(dtype)
    torch.optim.Adafactor([weight], lr=1.0, weight_decay=0.0, **options).step()
    return weight.detach().double().square().mean().sqrt().item()


def relative(dtype, **options):
    sizes = [step_size(dtype, scale, **options) / step_size(dtype, 1.0, **options) for scale in (1e-1, 1e-2, 1e-3, 1e-4)]
    print(dtype, options, [round(size, 4) for size in sizes])
    return sizes


fp32, fp16, bf16 = relative(torch.float32), relative(torch.float16), relative(torch.bfloat16)
helped = relative(torch.bfloat16, eps=(1e-30, 1e-3))
assert min(fp32) > 0.99 and fp16[2] > 0.9 and fp16[3] < 0.2 and min(helped) > 0.95
assert bf16[1] > 0.9 and bf16[2] < 0.2 and bf16[3] < 0.02
PY
