#!/usr/bin/env bash
# bitsandbytes 0.50.2 (torch 2.13.0, CPU): SGD(nesterov=True) and others take torch's options, document them, and leave
# them out.
#
# SGD's nesterov and dampening, RMSprop's momentum and 32-bit Adam's amsgrad change no bit of the weights, in SGD8bit
# neither, where other options that are not there raise (RMSprop's centered, Adagrad's lr_decay, amsgrad in 8 bits). And
# Adam with weight_decay is AdamW: it shrinks the weights instead of adding to the gradient, which matters at the very
# decay that one has tuned with torch's Adam. So a swap for the memory alone changes the training.
#
# Seen: without and with nesterov, dampening, momentum, amsgrad: equal bits; Adam(weight_decay=0.1) after 20 steps: 4e-07
# away from torch's AdamW, 9e-02 from torch's Adam
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy bitsandbytes==0.50.2
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import bitsandbytes
import torch

ours, theirs = bitsandbytes.optim, torch.optim


def trained(optimizer, **options):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4096, generator=generator))
    start = weight.detach().clone()
    stepping = optimizer([weight], lr=0.01, **options)
    for _ in range(20):
        weight.grad = torch.randn(4096, generator=generator) + 0.3
        stepping.step()
    return weight.detach() - start


def away(a, b):
    return ((a - b).norm() / b.norm()).item()


for name, base, option in (
    ("SGD", {"momentum": 0.9}, {"nesterov": True}),
    ("SGD", {"momentum": 0.9}, {"dampening": 0.5}),
    ("SGD8bit", {"momentum": 0.9}, {"nesterov": True}),
    ("RMSprop", {}, {"momentum": 0.9}),
    ("Adam", {}, {"amsgrad": True}),
):
    left_out = torch.equal(trained(getattr(ours, name), **base, **option), trained(getattr(ours, name), **base))
    wanted = trained(getattr(theirs, name.removesuffix("8bit")), **base, **option)
    matters = away(wanted, trained(getattr(ours, name), **base))
    print(f"{name:8} {option} left out: {left_out}; torch's differs by {matters:.0e}")
    assert left_out and matters > 1e-5, name

for refused in (lambda: trained(ours.RMSprop, centered=True), lambda: trained(ours.AdamW8bit, amsgrad=True)):
    try:
        refused()
    except (NotImplementedError, ValueError) as error:
        print("refused:", error)
    else:
        raise SystemExit("no longer refused")

decayed = trained(ours.Adam, weight_decay=0.1)
adamw, adam = (away(decayed, trained(kind, weight_decay=0.1)) for kind in (theirs.AdamW, theirs.Adam))
print(f"Adam(weight_decay=0.1): {adamw:.0e} from torch's AdamW, {adam:.0e} from torch's Adam")
assert adamw < 1e-5 < 1e-2 < adam
PY
