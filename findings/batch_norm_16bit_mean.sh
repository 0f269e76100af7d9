#!/usr/bin/env bash
# torch 2.13.0, CPU: batch_norm with 16-bit parameters keeps the mean that its backward uses rounded to 16 bits.
#
# The gradient of the weight is sum(dy * (x - mean) / std). All rows share the rounding of mean, so the error does not
# average out: it is sum(dy) times that rounding. With columns whose mean is 3 and a dy that is mostly positive, the
# weight's gradient is off by several times its own size, while the output and the bias' gradient are right.
#
# Seen (relative error of the weight's and the bias' gradient): bf16 3.7e+00, 2e-03; fp16 4.4e-01, 3e-04
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)) + 3
dy = torch.rand(20_000, 8, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.75
for dtype, least in ((torch.bfloat16, 1.0), (torch.float16, 0.1)):
    found = []
    for wide in (dtype, torch.float64):
        weight, bias = (torch.ones(8, dtype=wide, requires_grad=True) for _ in range(2))
        y = F.batch_norm(x.to(dtype).to(wide), None, None, weight, bias, training=True)
        y.backward(dy.to(dtype).to(wide))
        found.append((weight.grad.double(), bias.grad.double(), y.double()))
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(*found)]
    print(f"{dtype}: weight {errors[0]:.1e}, bias {errors[1]:.1e}, output {errors[2]:.1e}")
    assert errors[0] > least and errors[1] < 0.01 and errors[2] < 0.01
PY
