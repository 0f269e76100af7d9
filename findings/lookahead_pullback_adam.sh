#!/usr/bin/env bash
# pytorch_optimizer 4.1.0 with torch 2.13.0: Lookahead's pullback_momentum changes nothing around Adam, and fills memory.
#
# Each k steps Lookahead draws the weights back towards the slow ones. What becomes of the inner optimizer's momentum, which
# belongs to the weights that were left, is the caller's choice: "none", "reset" (to 0) or "pullback" (average it alike). One
# expects Adam's first moment to be reset. What is reset and averaged is state["momentum_buffer"], the name that SGD has. Where
# there is none, it is made: AdamW, AdaBelief and Lion get a tensor that nobody reads (two with "pullback"), a copy of the
# weights' size each, and train exactly as with "none". Around SGD with momentum the three differ, so the option is in order.
#
# Seen, 20 steps, largest distance of a weight from "none": SGD with momentum reset 0.92, pullback 0.37; AdamW, AdaBelief and Lion
# 0 and 0; AdamW's first moment 0 after a reset: False; AdamW's state with "reset": step, exp_avg, exp_avg_sq, momentum_buffer
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 pytorch_optimizer==4.1.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from pytorch_optimizer import AdaBelief, Lion, Lookahead


def trained(inner, pullback, steps=20, **options):
    """Return the weight and the inner optimizer's state after `steps` steps of Lookahead with k = 3."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8))
    optimizer = Lookahead(inner([weight], **options), k=3, alpha=0.5, pullback_momentum=pullback)
    for _ in range(steps):
        optimizer.zero_grad()
        (torch.linspace(1, 10, 8) * weight.square()).sum().backward()
        optimizer.step()
    return weight.detach(), optimizer.optimizer.state[weight]


def distances(inner, **options):
    plain, _ = trained(inner, "none", **options)
    return [(trained(inner, way, **options)[0] - plain).abs().max().item() for way in ("reset", "pullback")]


moved = distances(torch.optim.SGD, lr=0.01, momentum=0.9)
print("SGD with momentum: reset {:.2f}, pullback {:.2f}".format(*moved))
assert min(moved) > 0.1
for inner in (torch.optim.AdamW, AdaBelief, Lion):
    moved = distances(inner, lr=0.1)
    print(f"{inner.__name__}: reset {moved[0]}, pullback {moved[1]}")
    assert moved == [0, 0], inner
_, state = trained(torch.optim.AdamW, "reset", steps=3, lr=0.1)  # the third step resets
print("AdamW's first moment 0 after a reset:", not state["exp_avg"].any().item(), "; its state:", ", ".join(state))
assert state["exp_avg"].all() and not state["momentum_buffer"].any()
PY
