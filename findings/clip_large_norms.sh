#!/usr/bin/env bash
# torch 2.13.0, CPU: clip_grad_norm_ turns finite gradients with a norm above 1.8e19 into zeros, and calls it a step.
#
# The norm of fp32 values is squared in fp32, where it overflows although the norm itself would fit (4 values of 1e20
# have the norm 2e20, and fp32 ends at 3.4e38). The coefficient is then max_norm / inf = 0. The optimizer steps with
# zeros: weights that are far too wrong to recover look as if they had converged. A GradScaler sees nothing either: the
# gradients were finite when it looked. error_if_nonfinite=True raises, with a text that blames the gradients.
#
# Seen: norm inf, all gradients 0.0, with foreach True and False; in fp64 the norm is 2e20
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from torch.nn.utils import clip_grad_norm_

for foreach in (True, False):
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.full((4,), 1e20)
    truth = weight.grad.double().norm().item()
    norm = clip_grad_norm_([weight], 1.0, foreach=foreach)
    print("foreach", foreach, "norm", norm.item(), "in fp64", truth, "gradients", weight.grad.tolist())
    assert norm.isinf() and 1.9e20 < truth < 2.1e20
    assert not weight.grad.any()
PY
