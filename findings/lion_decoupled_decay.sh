#!/usr/bin/env bash
# lion-pytorch 0.2.5 with torch 2.13.0: decoupled_weight_decay=True divides by the constructor's rate, not by the group's.
#
# Decoupled decay is meant to take weight_decay of a weight at each step of a schedule's full rate, whatever that rate is. It
# does so by weight_decay / (first rate) * (present rate). One takes the first rate to be the group's own. It is the lr argument
# of the constructor, 1e-4 if none was given. Where rates stand in the parameter groups, as for a head that learns faster,
# each group decays by its rate over that one: with lr=1e-2 and a weight decay of 0.01, common values, all of the weight at
# every step, and with 3e-2 it changes sign. A state that is loaded brings its rates and not that number, so that a
# resumed optimizer whose constructor has another rate decays otherwise.
#
# Seen, a weight of 1 without a gradient, weight_decay=0.01, after a step: lr=1e-2 given to the constructor 0.99, in a group 0.0,
# 3e-2 in a group -2.0; a body of 1e-4 and a head of 1e-3 0.99 and 0.9; loaded into an optimizer made with 1e-4 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 lion-pytorch==0.2.5
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from lion_pytorch import Lion

OPTIONS = {"weight_decay": 0.01, "decoupled_weight_decay": True}


def weight():
    made = torch.nn.Parameter(torch.ones(()))
    made.grad = torch.zeros(())
    return made


def stepped(optimizer):
    """Return the weights after one step without a gradient."""
    optimizer.step()
    return [round(p.item(), 4) for group in optimizer.param_groups for p in group["params"]]


def grouped(*rates, **options):
    return Lion([{"params": [weight()], "lr": rate} for rate in rates], **options, **OPTIONS)


saved = Lion([weight()], lr=1e-2, **OPTIONS)
stepped(saved)
resumed = Lion([weight()], lr=1e-4, **OPTIONS)
resumed.load_state_dict(saved.state_dict())
seen = {
    "1e-2 in the constructor": (stepped(Lion([weight()], lr=1e-2, **OPTIONS)), [0.99]),
    "1e-2 in a group": (stepped(grouped(1e-2)), [0.0]),
    "3e-2 in a group": (stepped(grouped(3e-2)), [-2.0]),
    "a body of 1e-4 and a head of 1e-3": (stepped(grouped(1e-4, 1e-3, lr=1e-4)), [0.99, 0.9]),
    "1e-2 loaded into one made with 1e-4": (stepped(resumed), [0.0]),
}
for name, (after, expected) in seen.items():
    print(f"{name}: {after}")
    assert after == expected, (name, expected)
PY
