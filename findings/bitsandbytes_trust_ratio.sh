#!/usr/bin/env bash
# bitsandbytes 0.50.2 (torch 2.13.0, CPU): LAMB8bit is AdamW8bit and LARS8bit is SGD8bit, to the bit: there is no trust ratio.
#
# LAMB and LARS are Adam and SGD with the step of each layer made proportional to the norm of its weights, which is what they
# are for: large batches and large rates. The forms with 8-bit state take the same arguments, refuse those that they do not have
# (amsgrad, another max_unorm), and leave that ratio out. Weights below min_8bit_size keep 32-bit state, and get it: within one
# model the biases follow LAMB and the matrices Adam, with the same rate. LAMB and LARS themselves are right. A rate that was
# tuned for the ratio is then many times too large, or too small.
#
# Seen, 128 x 128 weight, rate 1e-3, 5 steps, how far it has moved: LAMB 0.0115, LAMB8bit and AdamW8bit 0.3348, equal bits; LARS
# 0.0011, LARS8bit and SGD8bit 0.8121, equal bits; 128 elements: LAMB8bit and LAMB equal bits, LARS8bit and LARS too
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy bitsandbytes==0.50.2
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import bitsandbytes.optim as optim
import torch


def trained(optimizer, shape, **options):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(0.1 * torch.randn(shape, generator=generator))
    before = weight.detach().clone()
    steps = optimizer([weight], lr=1e-3, **options)
    for _ in range(5):
        weight.grad = torch.randn(shape, generator=generator)
        steps.step()
    return weight.detach(), (weight.detach() - before).norm().item()


for shape in ((128, 128), (128,)):
    for layered, plain, eight, options in (
        (optim.LAMB, optim.AdamW8bit, optim.LAMB8bit, {"weight_decay": 0.0}),
        (optim.LARS, optim.SGD8bit, optim.LARS8bit, {"momentum": 0.9, "weight_decay": 0.0}),
    ):
        names = [kind.__name__ for kind in (layered, plain, eight)]
        (a, far_a), (b, far_b), (c, far_c) = (trained(kind, shape, **options) for kind in (layered, plain, eight))
        same = torch.equal(c, a), torch.equal(c, b)
        print(f"{shape}: {names[0]} {far_a:.4f}, {names[1]} {far_b:.4f}, {names[2]} {far_c:.4f}, equal to the first, second: {same}")
        assert same == ((False, True) if len(shape) == 2 else (True, False))
        assert len(shape) == 1 or far_c > 2 * far_a
PY
