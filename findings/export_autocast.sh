#!/usr/bin/env bash
# torch 2.13.0: torch.export under autocast returns a program in fp32, though its own record says bf16.
#
# What runs under autocast runs in 16 bits, and torch.export.export(model, rows) in such a context traces exactly that run: the
# result that it records is bf16, as is the model's own in the same place. One expects the casts to be in the program, as they
# are when a call of autocast stands in forward(), and as make_fx has them. They are left out, in both modes of export: the
# program computes in fp32, at fp32's speed and with fp32's products, and gives a result of another dtype than node.meta["val"]
# says and than what follows was traced with. It is as sensitive to a context around its calls as the model was.
#
# Seen, a linear layer, dtypes of the recorded and of the computed result: exported under autocast bf16, fp32; by make_fx under
# it bf16; with autocast in forward() bf16, bf16; called under autocast bf16
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from torch.fx.experimental.proxy_tensor import make_fx


class Inside(torch.nn.Linear):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


def recorded(program):
    """Return the dtype of the result that was seen while the program was traced."""
    (result,) = program.graph.output_node().args[0]
    return result.meta["val"].dtype


plain, inside, x = torch.nn.Linear(8, 8), Inside(8, 8), torch.randn(4, 8)
with torch.autocast("cpu", dtype=torch.bfloat16):
    eager = plain(x).dtype
    around = [torch.export.export(plain, (x,), strict=strict) for strict in (False, True)]
    other = make_fx(plain)(x)
found = [(recorded(program), program.module()(x).dtype) for program in around]
print("eager", eager, "; exported under autocast", found)
assert eager == torch.bfloat16 and found == [(torch.bfloat16, torch.float32)] * 2
print("by make_fx", other(x).dtype)
assert other(x).dtype == torch.bfloat16
program = torch.export.export(inside, (x,))
print("autocast in forward()", recorded(program), program.module()(x).dtype)
assert recorded(program) == program.module()(x).dtype == torch.bfloat16
with torch.autocast("cpu", dtype=torch.bfloat16):
    called = around[0].module()(x).dtype
print("called under autocast", called)
assert called == torch.bfloat16
PY
