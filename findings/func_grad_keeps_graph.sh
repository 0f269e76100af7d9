#!/usr/bin/env bash
# torch 2.13.0: what torch.func.grad returns for a model's parameters holds the whole graph of the forward, as long as it lives.
#
# torch.func.grad is a function from values to values, and one expects numbers without a history, as from torch.autograd.grad or
# backward(). For derivatives of derivatives its result is differentiable in what requires a gradient outside, and the
# parameters of a model do: dict(model.named_parameters()) is what one has at hand. So each gradient has a graph that holds all
# activations. As p.grad they stay through the optimizer's step and until the next gradient is set, so that two steps'
# activations are there at once; kept for statistics, one more set for each. vmap(grad(...)) for the gradient of each sample is
# the same, with a graph of the whole batch. Gradients are right. Detached parameters, or torch.no_grad() around the call, have
# no graph.
#
# Seen, requires_grad of the gradient, memory that it holds of 4 activations of 51 MB each: parameters True, about 250 MB;
# detached False, 0; in no_grad() False, 0; torch.autograd.grad False, 0; per-sample gradients of parameters True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/held.py" <<'PY'
import gc

import torch
from torch import nn

model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
x = torch.randn(200000, 64)
parameters = dict(model.named_parameters())
detached = {name: p.detach() for name, p in parameters.items()}


def loss(weights, rows):
    return torch.func.functional_call(model, weights, (rows,)).square().mean()


def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


def in_no_grad():
    with torch.no_grad():
        return torch.func.grad(loss)(parameters, x)["0.weight"]


ways = {
    "torch.autograd.grad": lambda: torch.autograd.grad(loss(parameters, x), parameters["0.weight"])[0],
    "parameters": lambda: torch.func.grad(loss)(parameters, x)["0.weight"],
    "detached": lambda: torch.func.grad(loss)(detached, x)["0.weight"],
    "in no_grad()": in_no_grad,
}
right = ways["torch.autograd.grad"]()
for name, way in ways.items():
    way()  # what a first call keeps for itself
    gradient = way()
    held = resident()
    tracked, close = gradient.requires_grad, torch.allclose(gradient.detach(), right, rtol=1e-3, atol=1e-6)
    del gradient
    held -= resident()
    print(f"{name}: requires_grad {tracked}, holds {held:.0f} MB")
    assert close and tracked == (name == "parameters") and (held > 150 if tracked else held < 40)

each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:8, None])
print("per sample:", each["0.weight"].requires_grad)
assert each["0.weight"].requires_grad
PY
MALLOC_MMAP_THRESHOLD_=1000000 "$folder/venv/bin/python" -W ignore "$folder/held.py" 2>/dev/null
