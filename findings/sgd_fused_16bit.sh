#!/usr/bin/env bash
# torch 2.13.0, CPU: SGD(fused=True) leaves 16-bit weights where they are, all but the last few of each tensor.
#
# The kernel works through a bf16 or fp16 tensor in whole vectors and does the rest one by one. What it makes of the vectors
# is not stored, with and without momentum, decay, nesterov and maximize: of n weights only the last n modulo the vector's
# length (16 in AVX2) move, in tensors of whole vectors none. (The momentum is stored, but read back as if it were fp32.)
# fp32 is right; so is foreach, and so are the fused Adam, AdamW and Adagrad. A model trains on as if lr were 0. torch's own
# tests have tensors of at most 6 elements; reported as pytorch/pytorch#191763 and put right after 2.13.
#
# Seen, 4 steps of lr 1 with gradients 1, how many of 100 weights have the value wanted: without momentum (-4) fp32 100,
# bf16 4, fp16 4; with momentum 1 (-10) fp32 100, bf16 4, fp16 4; all others are still 0; foreach always 100
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch


def train(dtype, momentum, **how):
    weight = torch.nn.Parameter(torch.zeros(100, dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=momentum, **how)
    for _ in range(4):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach().float()


for momentum, wanted in ((0.0, -4.0), (1.0, -10.0)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        fused, foreach = train(dtype, momentum, fused=True), train(dtype, momentum, foreach=True)
        right = (fused == wanted).sum().item()
        print(f"momentum {momentum:.0f}, {dtype}: {wanted:.0f} wanted, fused {right} of 100 have it, first {fused[0]:.0f}")
        assert (foreach == wanted).all()
        if dtype == torch.float32:
            assert right == 100
        else:
            assert right < 64 and right == fused.count_nonzero() and (fused[:32] == 0).all()
PY
