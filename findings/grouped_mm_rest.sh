#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.nn.functional.grouped_mm leaves rows after the last group, and their gradients, uninitialised.
#
# offs says where each group ends, and rows after offs[-1] belong to none: the documentation says that they are ignored, and
# a buffer of experts' tokens with room to spare is passed like that. In the result those rows are whatever the memory held,
# and so are these rows of the input's gradient, although nothing depends on them: a norm, a check for infinite values or a
# sum over the buffer reads them. (torch's own switch that fills new memory with NaN makes them visible.)
#
# Seen, 12 rows in groups that end at 4 and 8: the last 4 rows of the result are NaN, and of the input's gradient; the
# gradient's norm is NaN
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from torch.nn.functional import grouped_mm

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
tokens = torch.ones(12, 16, dtype=torch.bfloat16, requires_grad=True)
weights = torch.ones(2, 16, 8, dtype=torch.bfloat16, requires_grad=True)
result = grouped_mm(tokens, weights, offs=torch.tensor([4, 8], dtype=torch.int32))
result[:8].float().sum().backward()
print("result", result[:, 0].tolist())
print("gradient", tokens.grad[:, 0].tolist(), "norm", tokens.grad.float().norm().item())
assert result[:8].eq(16).all() and tokens.grad[:8].eq(8).all() and weights.grad.isfinite().all()
assert result[8:].isnan().all() and tokens.grad[8:].isnan().all()
PY
