#!/usr/bin/env bash
# torch 2.13.0: of a chain of schedulers, what stands before a LambdaLR is lost, and what stands behind it may last one step.
#
# ChainedScheduler multiplies: a warm-up by LinearLR and an ExponentialLR give the product of both. LambdaLR takes its place in
# the chain without a word, in either position, and it is what transformers' get_..._schedule_with_warmup return. It sets the
# rate to the initial one times its factor, whatever the rate is. So the scheduler before it has no effect at all, and of one
# behind it each change is there for one step: StepLR halves the rate in the steps where it would halve it for good. Two
# LambdaLR are the last one. CosineAnnealingWarmRestarts and OneCycleLR behind another set the rate as well. Stepping two
# schedulers by hand is the same. MultiplicativeLR is the chainable form.
#
# Seen, rates of steps 0 to 6, a factor of 0.9 a step and a half every two steps (product: 1 0.9 0.405 0.3645 0.1640 0.1476
# 0.0664): Exponential, Step: the product; Lambda, Step: 1 0.9 0.405 0.729 0.328 0.590 0.266; Step, Lambda: 1 0.9 0.81 0.729
# 0.656 0.590 0.531; Lambda of 0.5 a step, Lambda of 0.9: 1 0.9 0.81 0.729 0.656 0.590 0.531; Multiplicative, Step: the product
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from torch.optim import lr_scheduler as s

parts = {
    "Exponential": lambda o: s.ExponentialLR(o, 0.9),
    "Lambda": lambda o: s.LambdaLR(o, lambda step: 0.9**step),
    "Lambda 0.5": lambda o: s.LambdaLR(o, lambda step: 0.5**step),
    "Multiplicative": lambda o: s.MultiplicativeLR(o, lambda step: 0.9),
    "Step": lambda o: s.StepLR(o, 2, 0.5),
}


def rates(*names):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    chain = s.ChainedScheduler([parts[name](optimizer) for name in names])
    found = []
    for _ in range(7):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        chain.step()
    print(", ".join(names), *(f"{rate:.4f}" for rate in found))
    return torch.tensor(found)


ninth, half = 0.9 ** torch.arange(7), 0.5 ** (torch.arange(7) // 2)
once = torch.where(torch.arange(7) % 2 == 0, 0.5, 1.0)
once[0] = 1.0
assert torch.allclose(rates("Exponential", "Step"), ninth * half)
assert torch.allclose(rates("Multiplicative", "Step"), ninth * half)
assert torch.allclose(rates("Lambda", "Step"), ninth * once)
assert torch.allclose(rates("Step", "Lambda"), ninth)
assert torch.allclose(rates("Lambda 0.5", "Lambda"), ninth)
PY
