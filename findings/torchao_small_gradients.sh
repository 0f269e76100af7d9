#!/usr/bin/env bash
# torchao 0.18.0 with torch 2.13.0: AdamWFp8 and AdamW8bit step 16 times too far where a gradient is small in its block.
#
# They keep AdamW's two moments in 8 bits, 256 elements to a scale, and compute in fp32. One expects a noisy AdamW, and the worst
# for elements whose moments round to 0 to be that they stand still. It is the second moment that rounds to 0 first: it goes
# by the gradient's square, so at a thousandth of the block's largest gradient it lies at a millionth. The first moment is
# still there. What it is divided by is this one step's share alone, sqrt(1 - beta2) of the gradient: once the bias correction has
# faded, 31.6 times less than it should be. So weights of small gradients beside one large one take steps of many times the
# rate, in the direction of the gradient, for as long as the large one lasts. AdamW4bit has no 0 among its codes for the
# second moment, and errs the other way: these weights hardly move.
#
# Seen, a constant gradient of 1 and one of 1e-2, 3e-4, 1e-4, 1e-5 of it in one block, steps over the rate at step 400 (AdamW 1.00
# for all): AdamW8bit 1.00 16.45 16.29 14.22; AdamWFp8 1.03 18.91 17.46 15.78; AdamW4bit 0.024 1.2e-4 4e-5 4e-6
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchao==0.18.0
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8

torch.compiler.set_stance("force_eager")  # the same numbers, without a compiler
RATE, SIZES = 1e-3, (1.0, 1e-2, 3e-4, 1e-4, 1e-5)


def last_steps(kind, count=400):
    """Return how far each of the gradients moves its weight in the last step, over the rate."""
    weight = torch.nn.Parameter(torch.zeros(4096))  # smaller ones keep their moments in full
    optimizer = kind([weight], lr=RATE, weight_decay=0.0)
    gradient = torch.ones(4096)
    gradient[: len(SIZES)] = torch.tensor(SIZES)
    for _ in range(count):
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
    moved = ((before - weight.detach()) / RATE)[: len(SIZES)].tolist()
    print(f"{kind.__name__}:", " ".join(f"{value:.2g}" if value < 0.1 else f"{value:.2f}" for value in moved))
    return moved


assert all(abs(value - 1) < 0.01 for value in last_steps(torch.optim.AdamW))
for kind in (AdamW8bit, AdamWFp8):
    moved = last_steps(kind)
    assert all(abs(value - 1) < 0.1 for value in moved[:2]) and min(moved[2:]) > 10, kind
moved = last_steps(AdamW4bit)
assert abs(moved[0] - 1) < 0.1 and max(moved[1:]) < 0.1
PY
