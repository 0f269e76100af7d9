#!/usr/bin/env bash
# torch 2.13.0: under checkpoint(use_reentrant=True) a layer that is used n times steps n times in one backward.
#
# register_post_accumulate_grad_hook is called when p.grad is complete, once in a backward, also where a layer is used several
# times (layers that share weights, a block that is run again, a loop over depth): the parts are added first. A reentrant
# checkpoint runs a backward of its own for its segment, and each of them ends in p.grad and calls the hook. An optimizer in the
# hook steps with the last segment's part; the segments before are recomputed with the weights that it has just changed, so that
# their gradients belong to another forward. The loss of the step is right, nothing is raised. use_reentrant=False is right, and
# so are steps after the backward. Hooks on the tensor that clip or count are called once for each segment, too.
#
# Seen, one layer used four times, hook calls in one backward and distance of the weight after SGD in hooks from that after the
# backward: no checkpoint 1, 0; use_reentrant=False 1, 0; use_reentrant=True 4, 0.10
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from torch.utils.checkpoint import checkpoint


def trained(reentrant, in_hooks=True):
    """Return the weight after one step of SGD, and the number of hook calls; reentrant is None for no checkpoint."""
    torch.manual_seed(0)
    layer, calls = torch.nn.Linear(4, 4), []
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in layer.parameters()}

    def step(p):
        calls.append(p)
        if in_hooks:
            optimizers[p].step()
            p.grad = None

    for p in layer.parameters():
        p.register_post_accumulate_grad_hook(step)
    x = torch.randn(8, 4, requires_grad=True)
    for _ in range(4):
        if reentrant is None:
            x = layer(x).tanh()
        else:
            x = checkpoint(lambda t: layer(t).tanh(), x, use_reentrant=reentrant)
    x.square().sum().backward()
    if not in_hooks:
        for optimizer in optimizers.values():
            optimizer.step()
    return layer.weight.detach(), sum(p is layer.weight for p in calls)


right = trained(None, in_hooks=False)[0]
assert torch.allclose(trained(True, in_hooks=False)[0], right)
for reentrant, expected in ((None, 1), (False, 1), (True, 4)):
    weight, calls = trained(reentrant)
    distance = (weight - right).norm().item()
    print(f"use_reentrant={reentrant}: {calls} calls, {distance:.2g} away")
    assert calls == expected and (distance > 0.05) == (reentrant is True)
PY
