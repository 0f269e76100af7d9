#!/usr/bin/env bash
# torch 2.13.0, CPU: F.rrelu under torch.utils.checkpoint(use_reentrant=False) gives gradients of memory that nobody has written.
#
# rrelu saves its noise for the backward before it has drawn it. The recomputation stops as soon as all saved tensors
# have been seen (early stop), so before the noise is drawn, and the backward multiplies by whatever the memory held.
# Nothing is said; with set_checkpoint_early_stop(False) the gradient is right. Dropout is not concerned.
#
# Seen: the gradient is wrong with the default, equal without early stop.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import sys

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

x = -torch.ones(64)


def gradient(early_stop, replay):
    torch.manual_seed(0)
    w = torch.ones(64, requires_grad=True)
    run = lambda t: F.rrelu(t, training=True)  # noqa: E731
    with set_checkpoint_early_stop(early_stop):
        y = checkpoint(run, x * w, use_reentrant=False) if replay else run(x * w)
    y.sum().backward()
    return w.grad


plain = gradient(True, replay=False)
wrong = not torch.equal(gradient(True, replay=True), plain)
right = torch.equal(gradient(False, replay=True), plain)
print("default wrong:", wrong, "- without early stop right:", right)
sys.exit(0 if wrong and right else 1)
PY
