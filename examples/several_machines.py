"""Two processes train one model: torchrun --nproc-per-node 2 examples/several_machines.py."""

from __future__ import annotations

import os

import torch
from torch import nn

from spu import ModelParallelTrainer

torch.manual_seed(0)  # every process makes the same model
blocks = [nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.1)) for _ in range(4)]
model = nn.Sequential(nn.Embedding(64, 32), *blocks, nn.Linear(32, 64))

with ModelParallelTrainer(
    model, engine="distributed", precision="fp16", microbatches=4, transfer="int8", lr=1e-2
) as trainer:
    for step in range(6):
        draws = torch.Generator().manual_seed(step)  # and is given the same batches
        inputs = torch.randint(64, (8, 16), generator=draws)
        result = trainer.step(inputs, inputs * 3 % 64)
        if os.environ["RANK"] == "0":  # every process has the same numbers
            print(f"step {step} loss {result.loss:.3f} norm {result.grad_norm:.3f}")
    trainer.save("checkpoint")  # written by rank 0
