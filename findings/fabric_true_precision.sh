#!/usr/bin/env bash
# lightning 2.6.6 with torch 2.13.0: Fabric(precision="bf16-true") rounds every float that a module takes, and "64-true" returns
# fp32.
#
# The "-true" precisions convert a model's weights. The module that setup() returns also converts each floating-point tensor
# among its arguments, at any depth: targets for a loss inside the module, times, positions, weights of samples, all to bf16,
# where 257 is 256, and buffers of such numbers with the weights. And each floating-point tensor among its outputs goes to the
# default dtype, whatever it was: what the module computed in fp64 with care comes out in fp32. So with "64-true", which is
# chosen for a comparison in fp64, the loss is computed from outputs that were rounded to fp32, unless the default dtype was
# changed as well.
#
# Seen, "bf16-true": a target of 257 in a dictionary is 256 inside, a buffer too, an fp64 output is fp32 outside; "64-true":
# weights fp64, output fp32, 1 + 1e-9 comes out as 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy lightning==2.6.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import lightning
import torch
from torch import nn

torch.set_num_threads(2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("position", torch.full((1,), 257.0))

    def forward(self, x, batch):
        self.inside = batch["target"], batch["index"]
        return self.layer(x), batch["target"].double() + 1e-9


def call(precision, target):
    """Return the module, and its two outputs."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    model = Model()
    wrapped, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return model, *wrapped(torch.ones(1, 1), {"target": torch.tensor([target]), "index": torch.tensor([257])})


model, output, precise = call("bf16-true", 257.0)
target, index = model.inside
print(f"bf16-true: target {target}, index {index}, buffer {model.position}, outputs {output.dtype}, {precise.dtype}")
assert target.dtype is torch.bfloat16 and target.item() == 256 == model.position.item() and index.item() == 257
assert output.dtype is precise.dtype is torch.float32 and model.layer.weight.dtype is torch.bfloat16
model, output, precise = call("64-true", 1.0)
print(f"64-true: weights {model.layer.weight.dtype}, output {output.dtype}, 1 + 1e-9 - 1 = {precise.item() - 1}")
assert model.layer.weight.dtype is torch.float64 and model.inside[0].dtype is torch.float64
assert output.dtype is torch.float32 and precise.item() == 1
PY
