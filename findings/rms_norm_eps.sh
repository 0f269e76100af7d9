#!/usr/bin/env bash
# torch 2.13.0, CPU: rms_norm with eps=None uses fp32's epsilon for bf16 and fp16 inputs.
#
# The documentation says the epsilon is torch.finfo of the input's dtype. For a row of 1e-4 that would be 0.0011 in bf16
# (eps 2**-7) and 0.0032 in fp16 (2**-10); both give fp32's 0.28 (2**-23). fp64 uses its own. A model that is written
# with eps=None therefore computes the same function in 16 bits as in fp32, and another one in fp64.
#
# Seen: float32 0.2782, bfloat16 0.2793, float16 0.2783, float64 1.0000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
import torch.nn.functional as F

found = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    row = torch.full((1, 4), 1e-4, dtype=dtype)
    found[dtype] = F.rms_norm(row, (4,))[0, 0].item()
    by_own_eps = 1e-4 / (1e-8 + torch.finfo(dtype).eps) ** 0.5
    print(f"{dtype}: {found[dtype]:.4f}; with finfo({dtype}).eps it would be {by_own_eps:.4f}")
fp32 = found[torch.float32]
assert abs(fp32 - 0.2782) < 1e-3 and found[torch.float64] > 0.999
assert all(abs(found[half] - fp32) < 5e-3 for half in (torch.bfloat16, torch.float16))
PY
