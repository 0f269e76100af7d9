#!/usr/bin/env bash
# torch 2.13.0: in parametrize.cached() a first forward under no_grad() leaves the parametrised weights without a gradient.
#
# weight_norm, spectral_norm, orthogonal and low-rank weights are computed at each use, and torch.nn.utils.parametrize.cached()
# makes that once for all uses within it: in a loop over time, or in a model that is called twice in a step. It keeps what the
# first use computed, and does not look at whether gradients were on. So if the first forward is under no_grad() (a rollout,
# targets for distillation, a sample for the log, a look at layer.weight), the training forward takes a weight without a graph.
# The loss is right, backward() passes, biases and plain layers get gradients, and the parametrised weights None, which
# optimizers leave out.
#
# Seen, weight_norm on a layer, loss and parameters with a gradient (bias, and the weight's two): no cache 3; cached(),
# no_grad() first 1; cached(), gradients first 3; no_grad() outside before 3; the loss is the same in all
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
from contextlib import nullcontext

import torch
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm


def trained(cached, first, context=nullcontext):
    """Return the loss, and how many parameters have a gradient; first: the forward before the training one."""
    torch.manual_seed(0)
    layer, x = weight_norm(torch.nn.Linear(3, 3)), torch.ones(2, 3)
    with parametrize.cached() if cached else nullcontext():
        with context():
            if first:
                layer(x)
        loss = layer(x).square().mean()
        loss.backward()
    return loss.item(), sum(p.grad is not None for p in layer.parameters())


plain = trained(False, False)
cases = {
    "no cache, no_grad() first": (trained(False, True, torch.no_grad), 3),
    "cached(), no_grad() first": (trained(True, True, torch.no_grad), 1),
    "cached(), gradients first": (trained(True, True), 3),
    "cached(), nothing first": (trained(True, False), 3),
}
for name, (found, expected) in cases.items():
    print(f"{name}: loss {found[0]:.4f}, {found[1]} of 3 have a gradient")
    assert found == (plain[0], expected), name
PY
