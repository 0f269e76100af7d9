#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.13.0: backward() through a model under cpu_offload or disk_offload gives no weight a gradient.
#
# cpu_offload and disk_offload let a model run that does not fit: each layer's weights are fetched before its forward and put
# away after it. The loss is right, and it has a graph; backward() passes, the optimizer steps, and no error or warning says that
# nothing is trained. The gradients go to the fetched weights, which nobody holds any more; parameters() has placeholders on
# "meta" whose .grad is None, and an optimizer leaves those out. One expects gradients, or to be refused. The gradient of the input
# is right, so that a part before it that is not offloaded trains as if all were well.
#
# Seen, two linear layers, loss of the first step as of the plain model: gradients plain 4 of 4, cpu_offload 0 of 4, disk_offload 0
# of 4; the input's gradient as of the plain model; loss over 6 steps of SGD: plain 1.88 to 0.08, offloaded 1.88 to 1.88
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy accelerate==1.15.0
"$folder/venv/bin/python" - "$folder/weights" <<'PY'
import copy
import sys
import warnings

import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

torch.manual_seed(0)
plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
x = torch.randn(3, 4)
wanted = x.clone().requires_grad_()
plain(wanted).square().sum().backward()
plain.zero_grad()


def run(model):
    """Return gradients, whether the input's is right, and the loss of 6 steps."""
    given = x.clone().requires_grad_()
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(given).square().sum()
        loss.backward()
        losses.append(loss.item())
        if len(losses) == 1:
            made = sum(p.grad is not None for p in model.parameters())
            right = torch.allclose(given.grad, wanted.grad)
        optimizer.step()
    return made, right, losses


models = {
    "plain": copy.deepcopy(plain),
    "cpu_offload": cpu_offload(copy.deepcopy(plain), execution_device="cpu"),
    "disk_offload": disk_offload(copy.deepcopy(plain), sys.argv[1], execution_device="cpu"),
}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = {name: run(model) for name, model in models.items()}
for name, (made, right, losses) in results.items():
    print(f"{name}: {made} of 4 gradients; the input's right: {right}; loss {losses[0]:.4f} ... {losses[-1]:.4f}")
print(f"warnings: {len(caught)}")
assert results["plain"][0] == 4 and results["plain"][2][-1] < 0.5 * results["plain"][2][0]
for name in ("cpu_offload", "disk_offload"):
    made, right, losses = results[name]
    assert made == 0 and right and len(set(losses)) == 1 and abs(losses[0] - results["plain"][2][0]) < 1e-6
assert not caught
PY
