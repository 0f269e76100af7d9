#!/usr/bin/env bash
# torch 2.13.0: what is written into a parametrised weight is lost: nn.init, copy_, clamp_ and reset_parameters() change
# nothing.
#
# After weight_norm(layer), layer.weight is there as before, is read as before, and layer.weight = value sets it. So one
# initialises a model whose layers are parametrised (model.apply(init), layer.reset_parameters()), copies weights into it, or
# clamps them after a step. layer.weight is computed anew at each use, and these write into that result, which is thrown away.
# Biases and plain layers in the same loop are changed. No error, no warning: the model trains from another start than the one
# that was written. In parametrize.cached() the writes hold until its end. layer.weight = value, or writes before parametrising,
# do what is meant.
#
# Seen, weight of a linear layer after the write, distance from what was written: weight_norm, orthogonal, spectral_norm:
# nn.init.zeros_ with biases 0, copy_ and reset_parameters leave every bit of the weight; layer.weight = value of weight_norm
# 1e-7 away; plain layer 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

value = torch.full((4, 4), 0.25)


def init(module):
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def copied(layer):
    layer.weight.copy_(value)


@torch.no_grad()
def clamped(layer):
    layer.weight.clamp_(-0.01, 0.01)


writes = {
    "apply(init)": lambda layer: layer.apply(init),
    "reset_parameters()": lambda layer: layer.reset_parameters(),
    "copy_": copied,
    "clamp_": clamped,
}
kinds = {
    "plain": lambda layer: layer,
    "weight_norm": weight_norm,
    "orthogonal": orthogonal,
    "spectral_norm": spectral_norm,
}
for kind, make in kinds.items():
    for name, write in writes.items():
        torch.manual_seed(0)
        layer = make(nn.Linear(4, 4)).eval()  # in train() a look at a spectral norm changes it
        before = layer.weight.detach().clone()
        write(layer)
        kept = torch.equal(layer.weight, before)
        print(f"{kind}, {name}: weight {'as before' if kept else 'changed'}")
        assert kept == (kind != "plain"), (kind, name)
        if name == "apply(init)":
            assert not layer.bias.any()

layer = weight_norm(nn.Linear(4, 4))
layer.weight = value
assert torch.allclose(layer.weight, value)
before = layer.weight.detach().clone()
with parametrize.cached():
    nn.init.zeros_(layer.weight)
    assert not layer.weight.any()
assert torch.equal(layer.weight, before)
PY
