#!/usr/bin/env bash
# torch 2.13.0: a learning rate given as a tensor is one tensor for all groups of parameters, and schedulers write into it.
#
# AdamW([decay, no_decay], lr=torch.tensor(1.0)), as compiled optimizers ask for it, puts the same tensor into both groups.
# Schedulers fill a tensor rate in place. ReduceLROnPlateau reads and writes one group after the other, so a factor is
# applied once a group, and to every group; LambdaLR with a function a group leaves the last one's rate in all. The
# scheduler's own get_last_lr() shows the same tensor. With floats, or a tensor for each group, all is as written.
#
# Seen, two groups: ReduceLROnPlateau(factor=0.5): float 0.5 0.5, tensor 0.25 0.25; LambdaLR of 0.5 and 0.1: float
# 0.5 0.1, tensor 0.1 0.1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau


def optimizer(*rates, **default):
    rates = rates or (None, None)
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))]} | ({"lr": rate} if rate is not None else {}) for rate in rates]
    return torch.optim.AdamW(groups, **default)


def rates(made):
    return [round(float(group["lr"]), 4) for group in made.param_groups]


def after_plateau(made):
    scheduler = ReduceLROnPlateau(made, factor=0.5, patience=0)
    for loss in (1.0, 2.0):
        scheduler.step(loss)
    return rates(made)


def after_lambda(made):
    LambdaLR(made, [lambda step: 0.5, lambda step: 0.1])
    return rates(made)


for name, after, right, wrong in (
    ("ReduceLROnPlateau", after_plateau, [0.5, 0.5], [0.25, 0.25]),
    ("LambdaLR", after_lambda, [0.5, 0.1], [0.1, 0.1]),
):
    number, shared = after(optimizer(lr=1.0)), after(optimizer(lr=torch.tensor(1.0)))
    own = after(optimizer(torch.tensor(1.0), torch.tensor(1.0)))
    print(name, "float", number, "tensor", shared, "a tensor each", own)
    assert number == own == right and shared == wrong
PY
