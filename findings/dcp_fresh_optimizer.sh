#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.checkpoint: a new optimizer that is loaded gets its learning rate back, and none of its
# moments.
#
# save({"model": model, "optimizer": optimizer}) and load() of the same take objects with state_dict() and load_state_dict(),
# and one expects them to be as they were. load() asks the object for its state first and reads what it finds there, in place. A
# module has all its weights from the start. An optimizer has no moments before its first step, so none are looked for, and the
# groups' values, which are there, are restored: the rate is the saved one, the state is empty, and AdamW begins with its bias
# correction and moments of step one. What the checkpoint has beyond that is left out without a word. Of an optimizer that has
# made a step, moments and steps are loaded. get_state_dict() and set_state_dict() make the state first.
#
# Seen, AdamW after 20 steps, entries of its state, its rate, and how far 5 further steps end from the uninterrupted run: into a
# new optimizer 0, the saved rate, 0.34; into one that has made a step 2, the saved rate, 0; by get_state_dict and set_state_dict
# 2, the saved rate, 0; the model's weights are loaded in all
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/fresh.py" <<'PY'
import sys

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

rows, targets = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), torch.ones(32, 3)


def made(rate):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    return model, torch.optim.AdamW(model.parameters(), lr=rate)


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(rows) - targets).square().mean().backward()
        optimizer.step()


model, optimizer = made(0.05)
train(model, optimizer, 20)
dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=f"{sys.argv[1]}/objects")
weights, moments = get_state_dict(model, optimizer)
dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=f"{sys.argv[1]}/states")
saved = model.weight.detach().clone()
train(model, optimizer, 5)


def resumed(steps, by_states=False):
    """Return the entries of the state and the rate after a load, and the distance after 5 more steps."""
    own, loaded = made(7.0)
    train(own, loaded, steps)
    if by_states:
        weights, moments = get_state_dict(own, loaded)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=f"{sys.argv[1]}/states")
        set_state_dict(own, loaded, model_state_dict=weights, optim_state_dict=moments)
    else:
        dcp.load({"model": own, "optimizer": loaded}, checkpoint_id=f"{sys.argv[1]}/objects")
    assert torch.equal(own.weight, saved)
    entries, rate = len(loaded.state), loaded.param_groups[0]["lr"]
    train(own, loaded, 5)
    return entries, rate, (own.weight - model.weight).norm().item()


for name, (entries, rate, distance), right in (
    ("new", resumed(0), False),
    ("after a step", resumed(1), True),
    ("get_state_dict", resumed(0, by_states=True), True),
):
    print(f"{name}: {entries} entries, rate {rate}, {distance:.2g} away")
    assert rate == 0.05
    assert (entries, distance == 0) == ((2, True) if right else (0, False))
PY
"$folder/venv/bin/python" -W ignore "$folder/fresh.py" "$folder" 2>/dev/null
