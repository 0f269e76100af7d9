#!/usr/bin/env bash
# torch 2.13.0, CPU: from 65,520 rows on, cross_entropy of fp16 logits gives a gradient of 0 for every row.
#
# A mean divides by the number of rows, and the kernel keeps that number in the logits' dtype, where it is infinite from 65,520
# on: 8 sequences of 8,192 tokens. Everything is divided by it. The loss is NaN, or 0 where the rows' sum is still finite, as
# in a model that is nearly right; the gradient is finite in both cases, so that a GradScaler sees nothing and the optimizer
# goes on with weight decay and momentum alone. With class weights it is the sum of the rows' weights that counts. Fewer rows whose
# losses sum up to more than 65504 give an infinite loss and the right gradient. bf16 and fp32 are right.
#
# Seen, 4 classes, loss and largest gradient: 65,519 rows inf, 1.5e-5; 65,520 rows nan, 0.0; 65,520 rows of loss 5e-5: 0.0, 0.0;
# 30,000 rows with class weights of 1 to 4: nan, 0.0; in bf16 65,520 rows 1.73, 1.5e-5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import math

import torch
import torch.nn.functional as F

torch.manual_seed(0)
classes = torch.randint(4, (65520,))
unsure = torch.randn(65520, 4)
sure = 12.0 * F.one_hot(classes, 4) + unsure


def outcome(logits, rows, dtype, weight=None):
    """Return the mean loss of the first rows and the largest element of its gradient."""
    logits = logits[:rows].to(dtype).requires_grad_()
    loss = F.cross_entropy(logits, classes[:rows], weight=weight)
    loss.backward()
    found = loss.item(), logits.grad.abs().max().item()
    print(f"{dtype}, {rows} rows{', weighted' if weight is not None else ''}: loss {found[0]:.4g}, gradient {found[1]:.2g}")
    return found


fewer, whole = outcome(unsure, 65519, torch.float16), outcome(unsure, 65520, torch.float16)
confident = outcome(sure, 65520, torch.float16)
weighted = outcome(unsure, 30000, torch.float16, torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float16))
assert fewer[0] == math.inf and 1e-5 < fewer[1] < 2e-5
assert math.isnan(whole[0]) and math.isnan(weighted[0]) and confident[0] == 0.0
assert whole[1] == confident[1] == weighted[1] == 0.0
for dtype in (torch.bfloat16, torch.float32):
    right = outcome(unsure, 65520, dtype)
    assert 1.5 < right[0] < 2 and 1e-5 < right[1] < 2e-5
PY
