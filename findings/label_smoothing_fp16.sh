#!/usr/bin/env bash
# torch 2.13.0, CPU: the fp16 mean of cross_entropy is finite without label smoothing and infinite with it.
#
# 20,000 rows of loss about 1.4. Without smoothing the mean is right, since the rows' losses sum up to less than 65504 (for more
# see cross_entropy_fp16_rows.sh). With label_smoothing the part that spreads over the classes is a sum over rows and classes
# in fp16 before it is divided, and passes 65504: the "mean" is inf.
#
# Seen: fp16, label_smoothing 0.0: 1.4189; 0.1: inf; bf16 1.4141 and 1.4141
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
import torch.nn.functional as F

generator = torch.Generator().manual_seed(0)
logits = torch.rand(20_000, 4, generator=generator) + 0.5
targets = torch.zeros(20_000, dtype=torch.long)
for dtype in (torch.float16, torch.bfloat16):
    for smoothing in (0.0, 0.1):
        loss = F.cross_entropy(logits.to(dtype), targets, label_smoothing=smoothing).item()
        print(f"{dtype} label_smoothing {smoothing}: {loss:.4f}")
        assert (loss == float("inf")) == (dtype == torch.float16 and smoothing > 0)
        assert loss == float("inf") or abs(loss - 1.42) < 0.05
PY
