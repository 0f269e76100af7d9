#!/usr/bin/env bash
# torch 2.13.0: vector_to_parameters makes the parameters views of the vector, and training writes into it.
#
# torch.nn.utils.vector_to_parameters(vector, parameters) does, by its documentation, "copy slices of a vector into an iterable of
# parameters", and is the way back from parameters_to_vector: to the best weights so far, to an average, from one model to another.
# Nothing is copied: each parameter's .data becomes a view of the vector. The vector that was kept as the best is trained from then
# on; two models that are given one vector train the same memory, each against the other; and a vector of another dtype
# changes the parameters' dtype (a bf16 model is fp32 afterwards). The parameters are the same objects and all values are right at
# first. A clone of the vector for each call is safe.
#
# Seen, one step of SGD after the call: the kept vector has moved by 0.1; a second model has the same memory; a bf16 layer is
# float32; the weight's memory has 32 bytes (24 of its own); with a clone the vector stays
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def step(model):
    model.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


torch.manual_seed(0)
model = nn.Linear(3, 2)
weight = model.weight
best = parameters_to_vector(model.parameters()).detach().clone()
before = best.clone()

vector_to_parameters(best.clone(), model.parameters())
step(model)
stays = torch.equal(best, before)

vector_to_parameters(best, model.parameters())
right = torch.equal(weight.flatten(), before[:6])
step(model)
moved = (best - before).abs().max().item()
other = nn.Linear(3, 2)
vector_to_parameters(best, other.parameters())
same = other.weight.data_ptr() == model.weight.data_ptr()
narrow = nn.Linear(3, 2).bfloat16()
vector_to_parameters(best, narrow.parameters())
size = weight.untyped_storage().nbytes()
print(f"values right after the call {right}, same object {model.weight is weight}; the kept vector moved by {moved:.3f};", end=" ")
print(f"two models share memory {same}; a bf16 layer becomes {narrow.weight.dtype}; memory of 24 bytes' weight {size};", end=" ")
print(f"after a clone the vector stays {stays}")
assert right and model.weight is weight and stays
assert abs(moved - 0.1) < 1e-6 and same and narrow.weight.dtype is torch.float32 and size == 32
PY
