#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0: an OFT adapter with coft=True learns nothing at its default setting, and lets the training run.
#
# Constrained OFT keeps a rotation within a distance eps of none; eps is 6e-5 unless one sets it. One expects a mild limit.
# Each forward puts the trained values back to within that distance, so after any number of steps the output has moved by as
# little: by 4e-5 of itself here in fp32, and by 1e-4 in bf16, a small part of its rounding. Gradients are
# there and large, the optimizer steps, the loss stands still. With eps = 1e-2 the output moves by 0.6%.
#
# Seen, 200 steps of Adam at 1e-2, how far the output has moved, and the loss: no coft 1.1, 0.97 to 0.69; coft in fp32 3.9e-5, 0.972 to
# 0.972; coft in bf16 1.4e-4, 0.972 to 0.972; coft with eps = 1e-2 6.4e-3, 0.972 to 0.971
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy peft==0.21.2 transformers==5.24.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import copy

import torch
from peft import OFTConfig, get_peft_model
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
base = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
x, target = torch.randn(64, 32), torch.randn(64, 8)


def train(dtype, **options):
    """Return how far the output moved, relative to its norm, the first and last loss and the largest gradient."""
    torch.manual_seed(0)
    config = OFTConfig(target_modules=["0", "2"], oft_block_size=8, r=0, **options)
    model = get_peft_model(copy.deepcopy(base).to(dtype), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    before, losses = model(x.to(dtype)).detach().float(), []
    for _ in range(200):
        loss = (model(x.to(dtype)).float() - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = ((model(x.to(dtype)).float() - before).norm() / before.norm()).item()
    gradient = max(p.grad.abs().max().item() for p in trained)
    print(f"{dtype} {options}: moved {moved:.1e}, loss {losses[0]:.4f} to {losses[-1]:.4f}, gradient {gradient:.1e}")
    return moved, losses[0] - losses[-1], gradient


free = train(torch.float32)
assert free[0] > 0.5 and free[1] > 0.2
for dtype in (torch.float32, torch.bfloat16):
    moved, gain, gradient = train(dtype, coft=True)
    assert moved < 1e-3 and abs(gain) < 1e-3 and gradient > 1e-2
assert 1e-3 < train(torch.float32, coft=True, eps=1e-2)[0] < 2e-2
PY
