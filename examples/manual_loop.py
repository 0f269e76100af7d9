"""A model in parts, each on a device of its own, run by hand.

The loop detaches between the parts, as such loops are usually written. In plain PyTorch that would cut the graph, and
only the last part would get gradients; here the modules that the trainer yields bridge it. The last lines check that
every part holds the gradients of the unsplit model.

    python examples/manual_loop.py
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from spu import DeviceManager, ModelParallelTrainer

torch.manual_seed(0)
model_parts = [
    nn.Sequential(nn.Linear(64, 128), nn.GELU()),
    nn.Sequential(nn.Linear(128, 128), nn.GELU()),
    nn.Linear(128, 10),
]
unsplit = copy.deepcopy(nn.Sequential(*model_parts))
batch, labels = torch.randn(32, 64), torch.randint(10, (32,))

devices = DeviceManager().get_devices()
trainer = ModelParallelTrainer(devices=devices)
for part in model_parts:
    trainer.add_module(part)

prev_output = batch
for i, module in enumerate(trainer.modules()):
    x = prev_output
    if i > 0:
        x = prev_output.detach().requires_grad_(True)
    x = x.to(module.device)
    prev_output = module(x)
loss = nn.functional.cross_entropy(prev_output, labels.to(prev_output.device))
loss.backward()
print(f"loss {loss.item():.6f} on {', '.join(device.name for device in devices)}")

expected = nn.functional.cross_entropy(unsplit(batch), labels)
expected.backward()
for (name, parameter), own in zip(unsplit.named_parameters(), nn.Sequential(*model_parts).parameters(), strict=True):
    assert own.grad is not None, f"{name} has no gradient"
    difference = (own.grad.cpu() - parameter.grad).abs().max().item()
    assert difference <= 1e-6, f"the gradient of {name} differs by {difference}"
print("every part holds the gradients of the unsplit model")
