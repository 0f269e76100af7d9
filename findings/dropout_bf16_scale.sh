#!/usr/bin/env bash
# torch 2.13.0, CPU: dropout of bf16 values does not keep their mean: what is kept is multiplied by a rounded 1 / (1 - p).
#
# Dropout divides what it keeps by 1 - p, so that the expected value stays and eval() fits the training. In bf16 one expects
# each product to be rounded, a little up here and down there, as everywhere else. The factor is rounded first, to 8 bits, and
# is the same for all elements: 1 / 0.9 becomes 1.109375. Every dropout of p = 0.1 makes its branch smaller by 0.16%, of 0.05
# larger by 0.2%, and its gradient too; no average over elements or steps removes it, and eval() does not have it. Dropout of
# whole channels is the same, dropout inside scaled_dot_product_attention is right. p = 0.2 and 0.5 have exact factors. fp16 is
# off by 0.02% at most, fp32 not at all.
#
# Seen, sum of what is kept over the right one, and the gradient's factor over the right one: bf16 p = 0.1 0.9984, 0.9984; 0.05
# 1.0018, 1.0020; 0.3 1.0008, 1.0008; 0.2 1.0000, 1.0000; fp16 0.1 1.0002, 1.0002; fp32 1.0000, 1.0000; products rounded once
# would be within 0.0001
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.nn import functional as F

torch.manual_seed(0)
seen = {}
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for p in (0.1, 0.05, 0.3, 0.2):
        x = (torch.rand(1 << 20) + 0.5).to(dtype).requires_grad_()
        for name, drop in {"dropout": F.dropout, "channels": lambda x, p: F.dropout1d(x.view(1, -1, 1), p).view(-1)}.items():
            y = drop(x, p)
            kept = y != 0
            (gradient,) = torch.autograd.grad(y.sum(), x)
            right = x.detach()[kept].double() / (1 - p)
            values = (y[kept].double().sum() / right.sum()).item(), gradient.max().item() * (1 - p)
            once = (right.to(dtype).double().sum() / right.sum()).item()
            seen[dtype, p, name] = values
            print(f"{dtype} p = {p}, {name}: kept {values[0]:.4f}, gradient {values[1]:.4f}; rounded once {once:.4f}")
            assert abs(once - 1) < 1e-4
v = torch.ones(1, 1, 64, 64)
means = []
for dtype in (torch.bfloat16, torch.float32):
    q = torch.zeros_like(v, dtype=dtype)
    parts = [F.scaled_dot_product_attention(q, q, v.to(dtype), dropout_p=0.1) for _ in range(200)]
    means.append(torch.cat(parts).double().mean().item())
print(f"mean of attention with dropout 0.1 over values of 1: bf16 {means[0]:.4f}, fp32 {means[1]:.4f}")

for name in ("dropout", "channels"):
    bf16 = {p: seen[torch.bfloat16, p, name] for p in (0.1, 0.05, 0.3, 0.2)}
    assert max(bf16[0.1]) < 0.999 and min(bf16[0.05]) > 1.001 and min(bf16[0.3]) > 1.0005
    assert all(abs(value - 1) < 1e-4 for value in bf16[0.2])
    assert all(1e-5 < abs(value - 1) < 3e-4 for value in seen[torch.float16, 0.1, name])
    assert all(abs(value - 1) < 1e-6 for value in seen[torch.float32, 0.1, name])
assert abs(means[0] - 1) < 1e-3
PY
