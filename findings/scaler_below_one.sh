#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.amp.GradScaler with a scale below 1 lets an infinite gradient through to the weights.
#
# unscale_ looks at the scaled gradient and multiplies it by 1 / scale after that. While the scale is above 1 that only
# makes values smaller; after many overflows, or with a small init_scale, it makes them larger, and what overflows in
# the multiplication is not seen: step() takes it, and update() counts a good step.
#
# Seen: the gradient is finite before unscale_ and inf after it; the weight is -inf; the scale stays 0.5 (no backoff)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import torch

weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([weight], lr=0.1)
scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
scaler.scale((weight * torch.tensor([3e38, 1.0])).sum() * 2).backward()
assert weight.grad.isfinite().all()
scaler.unscale_(optimizer)
print("unscaled gradient", weight.grad.tolist())
assert weight.grad[0].isinf()
scaler.step(optimizer)
scaler.update()
print("weight", weight.tolist(), "scale", scaler.get_scale())
assert weight[0].isinf() and scaler.get_scale() == 0.5
PY
