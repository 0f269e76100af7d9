#!/usr/bin/env bash
# torch 2.13.0: torch.optim.Muon moves a weight whose gradient has become 0 at full size for 400 more steps.
#
# A momentum that is not fed dies away, and one expects its steps to do so: SGD's and Adam's add up to a few more. Muon makes
# each step orthogonal, whatever the size of the momentum, so 0.95^n of it steps as far as all of it, in a direction that
# is n steps old, until its norm is at eps = 1e-7. An expert without tokens, a matrix behind a gate that is closed, a head whose
# task pauses: with gradients of 0 (as opposed to None) they go on as if they were trained. Weight decay goes on as well.
#
# Seen, one step with a gradient, then 500 with 0, in units of the first one: Muon's steps 1, 100, 300: 1.0, 1.0, 1.0, the last
# full one is step 409, in all 434; AdamW's 0.67, 0.00003, 0, below 0.01 from step 40, in all 6.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch

gradient = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))


def steps(make):
    """Return the sizes of 501 steps, the first of which has a gradient, relative to the first."""
    weight = torch.nn.Parameter(torch.zeros(32, 32))
    optimizer = make([weight], lr=1.0, weight_decay=0.0)
    sizes = []
    for step in range(501):
        weight.grad = gradient.clone() if step == 0 else torch.zeros_like(weight)
        before = weight.detach().clone()
        optimizer.step()
        sizes.append((weight.detach() - before).norm().item())
    return [size / sizes[0] for size in sizes]


muon, adamw = steps(torch.optim.Muon), steps(torch.optim.AdamW)
first = next(k for k, size in enumerate(adamw) if size < 0.01)
last = max(k for k, size in enumerate(muon) if size > 0.9)
print("Muon: steps 1, 100, 300:", [round(muon[k], 2) for k in (1, 100, 300)], "in all", round(sum(muon)), "last full one", last)
print("AdamW: steps 1, 100, 300:", [round(adamw[k], 5) for k in (1, 100, 300)], "in all", round(sum(adamw), 1), "small from", first)
assert min(muon[:301]) > 0.9 and sum(muon) > 300 and sum(adamw) < 10
PY
