#!/usr/bin/env bash
# schedulefree 1.4.1 with torch 2.13.0: on bf16 weights a Schedule-Free optimizer reaches a point and then goes back.
#
# In bf16 one expects trouble with small steps, as of every optimizer, and then that the weights stand still. Here they get
# worse, and more steps lose what the first few hundred had won. Kept are y, at which gradients are taken, and z, which takes
# the full steps, both in the weights' dtype. y moves by a tenth of a step and by 1/t of the way to z, both soon less than half
# a unit in its last place: it stands still. z still moves, away from y. The weights of eval(), the average, are worked out of
# both as y - (z - y) / 9, so the further z has run, the further they go back. Plain SGD and AdamW at the same rate arrive with
# the same bf16 weights, and in fp32 all do.
#
# Seen, 1,000 weights from 0 to their optimum 1 with noisy gradients, mean after 300, 1,000 and 2,000 steps:
# SGDScheduleFree(lr=0.01) fp32 0.88, 1.06, 0.98; bf16 0.72, 0.67, 0.63 (y 0.79, 0.82, 0.82, z 1.35, 2.12, 2.49); SGD bf16 0.95,
# 1.00, 1.00. AdamWScheduleFree(lr=0.01) fp32 0.96, 0.98, 1.00; bf16 0.83, 0.76, 0.65; AdamW bf16 0.99, 1.00, 1.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy schedulefree==1.4.1
"$folder/venv/bin/python" -W ignore - <<'PY'
import schedulefree
import torch


def fitted(make, dtype):
    """Return the mean of the weights after 300, 1,000 and 2,000 steps; the optimum is 1."""
    weight = torch.nn.Parameter(torch.zeros(1000, dtype=dtype))
    optimizer, noise, means = make([weight]), torch.Generator().manual_seed(1), []
    switch = [getattr(optimizer, mode, lambda: None) for mode in ("train", "eval")]
    for step in range(1, 2001):
        switch[0]()
        weight.grad = (weight.detach().float() - 1 + 0.3 * torch.randn(1000, generator=noise)).to(dtype)
        optimizer.step()
        if step in (300, 1000, 2000):
            switch[1]()
            means.append(weight.detach().double().mean().item())
    return means


for free, plain in (
    (lambda p: schedulefree.SGDScheduleFree(p, lr=0.01), lambda p: torch.optim.SGD(p, lr=0.01)),
    (lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0)),
):
    single, narrow, usual = fitted(free, torch.float32), fitted(free, torch.bfloat16), fitted(plain, torch.bfloat16)
    for name, means in (("fp32", single), ("bf16", narrow), ("bf16 without Schedule-Free", usual)):
        print(f"{name}:", [f"{m:.2f}" for m in means])
    assert abs(single[-1] - 1) < 0.05 and abs(usual[-1] - 1) < 0.02
    assert 0.9 > narrow[0] > narrow[1] + 0.02 > narrow[2] + 0.04 and narrow[2] < 0.75
PY
