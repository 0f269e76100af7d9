#!/usr/bin/env bash
# ema-pytorch 0.8.3 with torch 2.13.0: EMA.forward_eval() runs the averaged model in training mode, and changes it.
#
# The method is there for a look at the averaged model without gradients and in evaluation mode, and puts the mode back
# afterwards. It remembers the mode and restores it, but does not call eval() in between. The averaged model is a copy of the
# trained one, so it is in training mode: dropout draws, two calls on one input differ, and batch norm normalises by the batch
# and moves the averaged model's running statistics towards what it was shown. A validation set of another distribution is
# then in the model that is saved. After ema.eval() it does what its name says, until train() of whatever holds the EMA.
#
# Seen: dropout, two calls equal False (after ema.eval() True); batch norm, running mean of the average before 1.00, after 20
# calls on values around -5 -4.27 (after ema.eval() 1.00 and 1.00); gradient none
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ema-pytorch==0.8.3
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from ema_pytorch import EMA
from torch import nn


def looked_at(evaluated):
    """Return whether two calls agree, and the average's running mean before and after 20 calls of forward_eval()."""
    torch.manual_seed(0)
    dropping = EMA(nn.Dropout(0.5))
    norm = nn.BatchNorm1d(1)
    average = EMA(norm, beta=0.9, update_after_step=0, update_every=1)
    for _ in range(200):
        norm(torch.randn(256, 1) + 1)
        average.update()
    if evaluated:
        dropping.eval()
        average.eval()
    x = torch.ones(64)
    same = torch.equal(dropping.forward_eval(x), dropping.forward_eval(x))
    means = [average.ema_model.running_mean.item()]
    for _ in range(20):
        out = average.forward_eval(torch.randn(256, 1) - 5)
    means.append(average.ema_model.running_mean.item())
    assert not out.requires_grad
    return same, *means


same, before, after = looked_at(False)
print(f"two calls equal {same}; running mean before {before:.2f}, after {after:.2f}")
assert not same and abs(before - 1) < 0.1 and after < -4
same, before, after = looked_at(True)
print(f"after ema.eval(): two calls equal {same}; running mean before {before:.2f}, after {after:.2f}")
assert same and before == after
PY
