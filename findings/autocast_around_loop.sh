#!/usr/bin/env bash
# torch 2.13.0: a training loop inside one autocast context computes with the first step's weights for ever.
#
# autocast keeps the 16-bit copy of each fp32 weight until the outermost context ends, by the weight's identity. An optimizer
# writes in place, so the copy stays: every forward is that of the first step, and so is every gradient. The loss does not
# move by a bit, while the weights go on along the first gradient, away from the minimum. The tensors' versions, by which
# autograd would know, are not looked at. With a context for each forward, or cache_enabled=False, the loop trains; in a
# longer context torch.clear_autocast_cache() is due after each step. (Weights swapped by copy_, an EMA's say, as well.)
#
# Seen, 20 steps, loss of the first, the second and the last, and with the weights at the end: a context a step 9.46 5.42 0.02
# 0.01; one context 9.46 9.46 9.46 161.52; the same without the cache 9.46 5.42 0.02 0.01
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
from contextlib import nullcontext

import torch
from torch.nn.functional import mse_loss


def train(around_loop, around_forward):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(64, 8)
    losses = []
    with around_loop:
        for _ in range(20):
            with around_forward:
                loss = mse_loss(model(x).float(), x.sum(1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        end = mse_loss(model(x).float(), x.sum(1, keepdim=True)).item()
    return losses, end


results = {
    "a context a step": train(nullcontext(), torch.autocast("cpu", torch.bfloat16)),
    "one context": train(torch.autocast("cpu", torch.bfloat16), nullcontext()),
    "one context, no cache": train(torch.autocast("cpu", torch.bfloat16, cache_enabled=False), nullcontext()),
}
for name, (losses, end) in results.items():
    print(f"{name:22} losses {losses[0]:.2f} {losses[1]:.2f} {losses[-1]:.2f}, of the weights at the end {end:.2f}")
    if name == "one context":
        assert len(set(losses)) == 1 and end > 2 * losses[0]
    else:
        assert losses[-1] < 0.1 and end < 0.1
PY
