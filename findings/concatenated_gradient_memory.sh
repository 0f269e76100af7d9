#!/usr/bin/env bash
# torch 2.13.0: the gradient of a parameter that is concatenated with activations holds the activations' gradient in memory.
#
# A learnt prompt, a class token or a padding row goes in front of the data by torch.cat or torch.vstack. The backward of a
# concatenation makes no copies: each side gets a view of the whole gradient. A parameter without a gradient keeps what
# arrives where nobody else holds that tensor, and a view that is dense counts as such, whatever it is a view of. So p.grad, which
# is as large as the prompt, keeps the gradient of prompt and data alive until zero_grad(), in each layer that does so; a
# step that comes later (accumulation, an optimizer after all backwards) has all of them. p.grad.nbytes does not show it,
# and torch.save(p.grad) writes it all. Of three weights that are concatenated (q, k, v) each gradient holds the memory of all
# three, and with torch.stack it is the same. Parameters that are expanded over a batch first get memory of their own.
#
# Seen, bytes of memory that p.grad holds (bytes of p): a prompt of 10 rows before 10,000 rows 2,562,560 (2,560), after another
# backward as well; saved 2,564,137; q, k, v 49,152 each (16,384), the same memory; stack of two 512 (256); expanded over a batch
# 256 (256)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import io

import torch
from torch import nn

torch.manual_seed(0)


def held(parameter):
    return parameter.grad.untyped_storage().nbytes()


prompt = nn.Parameter(torch.randn(10, 64))
weight = torch.randn(64, 64)
sizes = []
for _ in range(2):
    data = torch.randn(10_000, 64, requires_grad=True)
    (torch.cat([prompt, data]) @ weight).square().sum().backward()
    data = None
    sizes.append(held(prompt))
file = io.BytesIO()
torch.save(prompt.grad, file)
print(f"prompt of {prompt.nbytes:,} bytes: its gradient holds {sizes[0]:,}, after another backward {sizes[1]:,};", end=" ")
print(f"saved {file.tell():,}; grad.nbytes {prompt.grad.nbytes:,}")

q, k, v = (nn.Parameter(torch.randn(64, 64)) for _ in range(3))
(torch.randn(5, 64) @ torch.cat([q, k, v]).t()).square().sum().backward()
same = len({p.grad.untyped_storage().data_ptr() for p in (q, k, v)}) == 1
print(f"q, k, v of {q.nbytes:,} bytes: {held(q):,} {held(k):,} {held(v):,}, the same memory: {same}")

row = nn.Parameter(torch.randn(1, 64))
torch.stack([row, torch.randn(1, 64)]).square().sum().backward()
expanded = nn.Parameter(torch.randn(1, 1, 64))
torch.cat([expanded.expand(8, 1, 64), torch.randn(8, 100, 64)], 1).square().sum().backward()
print(f"stack: {held(row):,} of {row.nbytes:,}; expanded over a batch: {held(expanded):,} of {expanded.nbytes:,}")

assert sizes == [10_010 * 64 * 4] * 2 and prompt.grad.nbytes == 2_560 and file.tell() > 2_560_000
assert held(q) == held(k) == held(v) == 3 * q.nbytes and same
assert held(row) == 2 * row.nbytes and held(expanded) == expanded.nbytes
PY
