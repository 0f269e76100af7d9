#!/usr/bin/env bash
# torch 2.13.0: a scheduler that is made for a second phase takes the rate of the first one, whatever the optimizer's rate is.
#
# After a first phase at 1.0 the rate is set by hand to 0.01 and a new scheduler is made. The first one has left "initial_lr" in
# each group, and the second one keeps it as its base. Schedulers that compute from the base (LambdaLR, and with it every warm-up of
# transformers, CosineAnnealingWarmRestarts, SequentialLR) put the rate back to 1.0 times their factor, a hundred times too large, in
# the line that makes them. Those that multiply the present rate (StepLR, ExponentialLR, CosineAnnealingLR, PolynomialLR, LinearLR) take
# 0.01, so the same two lines are right or wrong by the scheduler's kind. Setting group["initial_lr"] beside group["lr"] helps.
#
# Seen, the rate after the second scheduler is made: LambdaLR 1.0, CosineAnnealingWarmRestarts 1.0, SequentialLR of a warm-up from
# 0.1 and a cosine 0.1; StepLR, ExponentialLR, CosineAnnealingLR, PolynomialLR 0.01, LinearLR from 0.1 0.001; with initial_lr set,
# LambdaLR 0.01, CosineAnnealingWarmRestarts 0.01, SequentialLR 0.001
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from torch.optim import lr_scheduler as s

schedulers = {
    "LambdaLR": (lambda o: s.LambdaLR(o, lambda step: 1 / (1 + step)), 1.0, 0.01),
    "CosineAnnealingWarmRestarts": (lambda o: s.CosineAnnealingWarmRestarts(o, 10), 1.0, 0.01),
    "SequentialLR": (
        lambda o: s.SequentialLR(o, [s.LinearLR(o, 0.1, 1.0, 3), s.CosineAnnealingLR(o, 10)], [3]),
        0.1,
        0.001,
    ),
    "StepLR": (lambda o: s.StepLR(o, 30, 0.5), 0.01, 0.01),
    "ExponentialLR": (lambda o: s.ExponentialLR(o, 0.9), 0.01, 0.01),
    "CosineAnnealingLR": (lambda o: s.CosineAnnealingLR(o, 10), 0.01, 0.01),
    "PolynomialLR": (lambda o: s.PolynomialLR(o, 10, 2.0), 0.01, 0.01),
    "LinearLR": (lambda o: s.LinearLR(o, 0.1, 1.0, 5), 0.001, 0.001),
}


def second(make, initial):
    """Return the rate after a first phase, a rate set by hand and a second scheduler."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = s.ConstantLR(optimizer, 1.0, 1)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    group = optimizer.param_groups[0]
    group["lr"] = 0.01
    if initial:
        group["initial_lr"] = 0.01
    make(optimizer)
    return group["lr"]


for name, (make, expected, right) in schedulers.items():
    rate, helped = second(make, False), second(make, True)
    print(f"{name}: {rate:.4g}; with initial_lr set too {helped:.4g}")
    assert abs(rate - expected) < 1e-9 and abs(helped - right) < 1e-9, name
PY
