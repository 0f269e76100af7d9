"""Train an nn.Sequential in a pipeline over all devices, in fp16 with a dynamic loss scale.

python examples/sequential.py
"""

from __future__ import annotations

import torch
from torch import nn

from spu import ModelParallelTrainer

torch.manual_seed(0)
teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
width = 128
model = nn.Sequential(
    nn.Linear(32, width),
    nn.GELU(),
    nn.LayerNorm(width),
    nn.Linear(width, width),
    nn.GELU(),
    nn.LayerNorm(width),
    nn.Linear(width, 8),
)

with ModelParallelTrainer(model, "auto", loss_fn=nn.functional.mse_loss, lr=3e-3, microbatches=4) as trainer:
    for step in range(101):
        inputs = torch.randn(64, 32)
        with torch.no_grad():
            targets = teacher(inputs)
        result = trainer.step(inputs, targets)
        if step == 0:
            print(trainer.plan.table())
        if step % 20 == 0:
            print(f"step {step:3d}  loss {result.loss:.4f}  scale {result.loss_scale:g}  skipped {result.skipped}")
