#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.rand in bf16 is 0 once in 512 numbers: what is rounded up to 1 becomes 0.
#
# Numbers are drawn in fp32, below 1, and rounded to the dtype. Those over 1 - 2^-9 have 1 as their nearest bf16, and 1 is not in
# [0, 1). They do not become the largest number below 1, or are drawn again: they become 0. So the smallest numbers are not
# rare: log(rand) is infinite in a tensor of a few thousand elements (Gumbel noise for sampling and routing, torch.log of it
# twice), and rand_like(x) < 0.001 is true three times as often as it should be. uniform_(a, b) sends what is rounded up to b to a:
# a bf16 weight of nn.init changes its sign from the largest to the smallest, and uniform_(3, 5) has a mean of 3.984. In fp16 it
# is one number in 4,096. bernoulli_, exponential_ and fp32 are right.
#
# Seen, 1,048,576 numbers, zeros; smallest of the fp32 draws that became zeros; share below 0.001; mean of uniform_(3, 5):
# bf16 2054, 0.99805, 0.0029, 3.984; fp16 270, 0.99976, 0.0012, 3.998; fp32 0, none, 0.0010, 4.000; all other numbers are the fp32
# draws, rounded; Gumbel noise -inf: 2054, 270, 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch

count = 1 << 20
torch.manual_seed(0)
draws = torch.rand(count)
for dtype, expected in ((torch.bfloat16, 2048), (torch.float16, 256), (torch.float32, 0)):
    torch.manual_seed(0)
    numbers = torch.rand(count, dtype=dtype)
    zero = numbers == 0
    from_ = draws[zero].min().item() if zero.any() else None
    others = torch.equal(numbers[~zero], draws.to(dtype)[~zero])
    infinite = (-torch.log(-torch.log(numbers))).isinf().sum().item()
    small = (numbers < 0.001).double().mean().item()
    mean = torch.empty(count, dtype=dtype).uniform_(3, 5).double().mean().item()
    print(f"{dtype}: zeros {zero.sum()}, of fp32 draws from {from_}; the others are the draws, rounded: {others};", end=" ")
    print(f"infinite Gumbel noise {infinite}; below 0.001 {small:.4f}; mean of uniform_(3, 5) {mean:.3f}")
    assert others and infinite == zero.sum()
    assert expected * 0.8 <= zero.sum() <= expected * 1.2
    assert from_ is None or torch.tensor(from_).to(dtype) == 1
    assert (small > 0.0025 and mean < 3.99) if dtype is torch.bfloat16 else small < 0.0015
PY
