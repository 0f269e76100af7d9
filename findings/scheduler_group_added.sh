#!/usr/bin/env bash
# torch 2.13.0: a group of parameters added during a warm-up is trained at more than twice its rate, for good.
#
# Layers are unfrozen one after the other by optimizer.add_param_group(), with a scheduler at work. LinearLR and ConstantLR
# multiply each group's rate by what the factor grows in this step. They bring the old groups from the reduced rate up to the given
# one, and a new group, which stands at its full rate, as far beyond. Cosine and polynomial decay are shifted less. LambdaLR,
# MultiplicativeLR, warm restarts, CyclicLR, OneCycleLR and SequentialLR raise at the next step (a zip() of lists of unequal length,
# a missing key), so one takes a scheduler that says nothing for one that copes.
#
# Seen, a second group of rate 1 added after 2 steps, both groups' rates after 9: LinearLR(0.1, 5 steps) 1, 2.174; ConstantLR(0.5, 8)
# 1, 2; a cosine's minimum at 10 0.0245, 0.0271; StepLR 0.125, 0.125; those six raise
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from torch.optim import lr_scheduler as s

schedulers = {
    "LinearLR": (lambda o: s.LinearLR(o, 0.1, 1.0, 5), (1.0, 2.1739)),
    "ConstantLR": (lambda o: s.ConstantLR(o, 0.5, 8), (1.0, 2.0)),
    "CosineAnnealingLR": (lambda o: s.CosineAnnealingLR(o, 10), (0.0245, 0.0271)),
    "StepLR": (lambda o: s.StepLR(o, 3, 0.5), (0.125, 0.125)),
    "LambdaLR": (lambda o: s.LambdaLR(o, lambda step: 1 / (1 + step)), None),
    "MultiplicativeLR": (lambda o: s.MultiplicativeLR(o, lambda step: 0.9), None),
    "CosineAnnealingWarmRestarts": (lambda o: s.CosineAnnealingWarmRestarts(o, 10), None),
    "CyclicLR": (lambda o: s.CyclicLR(o, 0.1, 1.0, 5, cycle_momentum=False), None),
    "OneCycleLR": (lambda o: s.OneCycleLR(o, 1.0, 10, cycle_momentum=False), None),
    "SequentialLR": (lambda o: s.SequentialLR(o, [s.LinearLR(o, 0.1, 1.0, 3), s.CosineAnnealingLR(o, 10)], [3]), None),
}


def parameter():
    return torch.nn.Parameter(torch.zeros(1))


for name, (make, expected) in schedulers.items():
    optimizer = torch.optim.SGD([parameter()], lr=1.0)
    scheduler = make(optimizer)
    raised = None
    for step in range(9):
        if step == 2:
            optimizer.add_param_group({"params": [parameter()], "lr": 1.0})
        optimizer.step()
        try:
            scheduler.step()
        except (ValueError, KeyError) as error:
            raised = error
            break
    rates = [group["lr"] for group in optimizer.param_groups]
    print(f"{name}: {f'raises {type(raised).__name__}' if raised else [round(rate, 4) for rate in rates]}")
    assert (raised is not None) == (expected is None), name
    assert raised or all(abs(rate - value) < 1e-3 for rate, value in zip(rates, expected)), name
PY
