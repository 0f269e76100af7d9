#!/usr/bin/env bash
# triton 3.9.0, TRITON_INTERPRET=1, torch 2.13.0: arithmetic of bf16 values is done with their bits, as if they were integers.
#
# Compiled, bf16 values are added and multiplied like any others, wider where the device needs it. The interpreter keeps a bf16
# tensor as 16-bit integers, for want of such a type in NumPy, and hands these to NumPy's functions: 1 + 2 is infinity, the product
# of two matrices of ones 4e9 instead of 16, every negative number is larger than all positive ones, a sum of four numbers is 0.
# Nothing is raised. abs, division and casts to fp32 know the type; a cast from fp32, or a store of it, cuts bits off instead of
# rounding to the nearest. fp16 and fp32 are right. So a kernel that is written for bf16 and tested interpreted has to widen each
# operand, and to round by hand.
#
# Seen, 1 -2 3 -4 and 2 -1 -5 0.5 in bf16: a + b inf, inf, 2e-38, -inf; a * b 0, 0, 7e-15, 0; maximum 2, -2, -5, -4; a / b right; sum
# of the first 0 (-2); product of 16 x 16 ones 4228120576 (16); stores of 1.70 and 1.0059 in fp32 1.6953125, 1.0 (1.703125,
# 1.0078125)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.9.0 numpy==2.2.6
cat > "$folder/kernels.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def pairs(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(out + i, (a + b).to(tl.float32))
    tl.store(out + N + i, (a * b).to(tl.float32))
    tl.store(out + 2 * N + i, tl.maximum(a, b).to(tl.float32))
    tl.store(out + 3 * N + i, (a / b).to(tl.float32))
    tl.store(out + 4 * N + i, tl.zeros((N,), tl.float32) + tl.sum(a, 0))


@triton.jit
def product(x, out, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a = tl.load(x + i)
    tl.store(out + i, tl.dot(a, a))


@triton.jit
def copy(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i))


def run(dtype):
    x = torch.tensor([1.0, -2.0, 3.0, -4.0], dtype=dtype)
    y = torch.tensor([2.0, -1.0, -5.0, 0.5], dtype=dtype)
    out = torch.zeros(5, 4)
    pairs[(1,)](x, y, out, 4)
    right = torch.stack([x + y, x * y, torch.maximum(x, y), x / y, x.sum().expand(4)]).float()
    ones = torch.zeros(16, 16)
    product[(1,)](torch.ones(16, 16, dtype=dtype), ones, 16)
    wide = torch.tensor([1.7, 1.0 + 2**-8 + 2**-9])
    narrow = torch.zeros(2, dtype=dtype)
    copy[(1,)](wide, narrow, 2)
    names = "a + b", "a * b", "maximum", "a / b", "sum of a"
    for name, row, wanted in zip(names, out, right):
        print(f"{dtype} {name}: {row.tolist()} (torch {wanted.tolist()})")
    print(f"{dtype} product of ones {ones[0, 0]:.0f}; store {narrow.tolist()} (torch {wide.to(dtype).tolist()})")
    equal = [torch.allclose(row, wanted, rtol=1e-2) for row, wanted in zip(out, right)]
    return equal, ones[0, 0] == 16, torch.equal(narrow, wide.to(dtype))


equal, ones, stored = run(torch.bfloat16)
assert equal == [False, False, False, True, False] and not ones and not stored
assert run(torch.float16) == ([True] * 5, True, True)
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore "$folder/kernels.py"
