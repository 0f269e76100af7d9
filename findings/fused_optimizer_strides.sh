#!/usr/bin/env bash
# torch 2.13.0, CPU: fused optimizers pair a weight's elements with those of another place where the strides differ.
#
# The fused kernels of Adam, AdamW, SGD and Adagrad walk weight, gradient and state through memory, each in its own order,
# and do not compare the orders. load_state_dict keeps the strides that the moments were saved with: after a checkpoint of a
# model in torch's default layout is loaded into the same model in torch.channels_last, each moment belongs to another
# weight. The loss after loading is right, no step raises, and the training goes another way. So does a step with a
# gradient that somebody has set (an all-reduced one, one of torch.func) in other strides than the weight's. foreach=True
# and the plain loop are right in both cases.
#
# Seen, 10 steps, then 10 more of the loaded model, AdamW: largest difference between the weights in the two layouts: foreach
# 3e-08, loop 3e-08, fused 2e-02; a set gradient, one step of SGD from 0: foreach and loop right, fused permuted
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import copy

import torch
from torch import nn

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
images = torch.randn(16, 3, 8, 8, generator=generator)
labels = torch.randint(10, (16,), generator=generator)


def make(how, layout=torch.contiguous_format):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Tanh(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10))
    model = model.to(memory_format=layout)
    return model, torch.optim.AdamW(model.parameters(), **how)


def train(model, optimizer):
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


for name, how in {"foreach": {"foreach": True}, "loop": {"foreach": False}, "fused": {"fused": True}}.items():
    model, optimizer = make(how)
    train(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model, optimizer = make(how, layout)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
        ends.append(train(model, optimizer))
    apart = (ends[0] - ends[1]).abs().max().item()

    weight = nn.Parameter(torch.zeros(2, 3))
    weight.grad = torch.arange(6.0).view(3, 2).t()
    torch.optim.SGD([weight], lr=1.0, **how).step()
    right = torch.equal(weight, -weight.grad)
    print(f"{name:8} the layouts end {apart:.0e} apart; the set gradient's step is {'right' if right else 'permuted'}")
    assert (apart > 1e-3 and not right) if name == "fused" else (apart < 1e-6 and right)
PY
