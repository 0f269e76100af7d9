#!/usr/bin/env bash
# torch 2.13.0: a scheduler that is made after the optimizer's state was loaded can leave the rate wrong for good.
#
# A scheduler's __init__ makes its first step: LinearLR, ConstantLR and what contains them (SequentialLR, ChainedScheduler)
# multiply the group's present rate by their first factor. Of a loaded optimizer that is the checkpoint's rate, not the
# initial one. scheduler.load_state_dict() restores counters and writes no rate, and the chain of factors goes on from the
# wrong one, to the end of training. Made before the load it is right. StepLR, ExponentialLR, CosineAnnealingLR,
# PolynomialLR and LambdaLR are right in both orders, so nothing hints at it.
#
# Seen, saved after 5 of 11 steps, the last rate uninterrupted and made before the load; made after it: LinearLR (a warm-up)
# 1; 0.1. ConstantLR 1; 0.5. A warm-up and a cosine by SequentialLR 0.6545; 0.0671. ChainedScheduler 0.3138; 0.0314
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import copy

import torch
from torch.optim import lr_scheduler as s

wrong = {
    "LinearLR": lambda o: s.LinearLR(o, 0.1, 1.0, 5),
    "ConstantLR": lambda o: s.ConstantLR(o, 0.5, 4),
    "SequentialLR": lambda o: s.SequentialLR(o, [s.LinearLR(o, 0.1, 1.0, 3), s.CosineAnnealingLR(o, 20)], [3]),
    "ChainedScheduler": lambda o: s.ChainedScheduler([s.ConstantLR(o, 0.1, 4), s.ExponentialLR(o, 0.9)]),
}
right = {
    "StepLR": lambda o: s.StepLR(o, 3, 0.5),
    "ExponentialLR": lambda o: s.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: s.CosineAnnealingLR(o, 20),
    "PolynomialLR": lambda o: s.PolynomialLR(o, 20, 2.0),
    "LambdaLR": lambda o: s.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
}


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def steps(o, scheduler, count):
    for _ in range(count):
        o.step()
        scheduler.step()
    return o.param_groups[0]["lr"]


for name, make in {**wrong, **right}.items():
    o = optimizer()
    scheduler = make(o)
    steps(o, scheduler, 5)
    saved = copy.deepcopy((o.state_dict(), scheduler.state_dict()))
    whole = steps(o, scheduler, 6)
    ends = []
    for made_first in (True, False):
        o = optimizer()
        scheduler = make(o) if made_first else None
        o.load_state_dict(saved[0])
        scheduler = scheduler or make(o)
        scheduler.load_state_dict(copy.deepcopy(saved[1]))
        ends.append(steps(o, scheduler, 6))
    print(f"{name:18} uninterrupted {whole:.4f}, made before the load {ends[0]:.4f}, made after it {ends[1]:.4f}")
    assert abs(ends[0] - whole) < 1e-9
    assert abs(ends[1] - whole) > 0.1 * whole if name in wrong else abs(ends[1] - whole) < 1e-9
PY
