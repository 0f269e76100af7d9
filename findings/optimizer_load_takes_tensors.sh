#!/usr/bin/env bash
# torch 2.13.0: optimizer.load_state_dict() takes the tensors it is given as its own, and training writes into the checkpoint.
#
# module.load_state_dict() copies values, and one expects the same of an optimizer. It makes new dicts, and keeps tensors that
# already have the right dtype and device: the checkpoint in memory and the optimizer share the moments and the step, and each
# step changes both. A checkpoint that is loaded once and started from several times (a sweep of learning rates, going back
# after a bad step, the best state so far) is another one at the second start: the weights are those saved, the moments are the
# first run's last. The same where one optimizer's state_dict() is loaded into another: both go on with one set of moments.
# Loaded from a file each time, onto another device, or through copy.deepcopy, all is right.
#
# Seen, 3 steps, then twice 5 equal steps from one checkpoint, difference of the two runs' weights: AdamW 2.6e-3, SGD with
# momentum 4.0, RMSprop 0.95, Adagrad 0.096; with a deepcopy 0 in all; the module's state is not shared
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import copy

import torch
from torch import nn


def trained(weight, optimizer, steps):
    for k in range(steps):
        weight.grad = torch.full((4, 4), 1.0 + k)
        optimizer.step()
    return weight.detach().clone()


def difference(name, prepared, **options):
    """Return how far apart two runs of 5 steps end that start from one checkpoint in memory."""

    def made():
        weight = nn.Parameter(torch.ones(4, 4))
        return weight, getattr(torch.optim, name)([weight], lr=0.1, **options)

    weight, optimizer = made()
    trained(weight, optimizer, 3)
    checkpoint = copy.deepcopy({"weight": weight.detach(), "optimizer": optimizer.state_dict()})
    ends = []
    for _ in range(2):
        weight, optimizer = made()
        weight.data.copy_(checkpoint["weight"])
        optimizer.load_state_dict(prepared(checkpoint["optimizer"]))
        ends.append(trained(weight, optimizer, 5))
    return (ends[0] - ends[1]).abs().max().item()


for name, options in (("AdamW", {}), ("SGD", {"momentum": 0.9}), ("RMSprop", {}), ("Adagrad", {})):
    as_is, copied = difference(name, lambda state: state, **options), difference(name, copy.deepcopy, **options)
    print(f"{name}: two runs from one checkpoint differ by {as_is:.2g}, from a deepcopy by {copied:.2g}")
    assert as_is > 1e-3 and copied == 0.0

module = nn.Linear(2, 2)
state = copy.deepcopy(module.state_dict())
module.load_state_dict(state)
module.weight.data.add_(1)
assert not torch.equal(state["weight"], module.weight)
PY
