#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.logit(p, eps) is infinite in 16 bits, which eps is there to prevent; so is its gradient.
#
# logit(p, eps=1e-3) first brings p into [eps, 1 - eps], so that a probability of 1 gives 6.9 instead of infinity. The bounds
# are made in the dtype of p, and 0.999 in bf16 is 1. Then nothing is bounded on that side, while it is on the other: 0 gives
# -6.9 and 1 gives inf, and the backward divides by 1 - p = 0. So it is for each eps below 0.002 in bf16 and below 0.00025 in
# fp16; the usual ones are 1e-6 and the like. p.float() before it helps.
#
# Seen, p 0 and 1: fp32 eps=1e-3 -6.91, 6.91; bf16 eps=1e-3 -6.91, inf; bf16 eps=1e-2 -4.59, 4.44; fp16 eps=1e-3 -6.91, 6.93;
# fp16 eps=1e-4 -9.21, inf. Gradients: bf16 eps=1e-3 0 and inf, fp32 0 and 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch


def logits(dtype, eps):
    """Return the logits of 0 and 1, and their gradients."""
    p = torch.tensor([0.0, 1.0], dtype=dtype, requires_grad=True)
    result = torch.logit(p, eps)
    result.sum().backward()
    return result.tolist(), p.grad.tolist()


for dtype, eps, bounded in (
    (torch.float32, 1e-3, True),
    (torch.bfloat16, 1e-3, False),
    (torch.bfloat16, 1e-2, True),
    (torch.float16, 1e-3, True),
    (torch.float16, 1e-4, False),
):
    values, gradients = logits(dtype, eps)
    print(f"{dtype}, eps={eps:g}: {values[0]:.2f}, {values[1]:.2f}; gradients {gradients}")
    assert abs(values[0]) < 20 and (values[1] < 20) == bounded and (values[1] == float("inf")) != bounded
PY
