#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.histc of bf16 values counts to 256 in each bin and stops; in fp16 it stops at 2,048.
#
# A histogram of weights, activations or gradients is taken of what a training has, and that is 16 bits. Counts come in the
# dtype of the values, and they are added up in it, one by one: 256 + 1 is 256 in bf16. So every bin with more than 256 values
# says 256, and a distribution looks uniform. Each thread counts for itself, so with n threads it may be n times as much, and
# which counts are wrong depends on their number. One expects the right count, rounded once (100,000 is 99,840 in bf16), as sum
# has it.
#
# Seen, one thread, 100,000 normal values in 5 bins from -2.5 to 2.5: fp32 6127 24114 38188 24396 5899; bf16 256 256 256 256
# 256; fp16 2048 2048 2048 2048 2048; two threads twice that
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch

values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
for threads in (1, 2):
    torch.set_num_threads(threads)
    for dtype, most in ((torch.float32, None), (torch.bfloat16, 256), (torch.float16, 2048)):
        counts = torch.histc(values.to(dtype), 5, -2.5, 2.5)
        print(f"{threads} threads, {dtype}: {counts.long().tolist()} of {counts.dtype}")
        assert counts.dtype is dtype
        if most is None:
            assert counts.max() > 30_000 and counts.min() > 5_000
        else:
            assert counts.max() == counts.min()
            assert (counts == most).all() if threads == 1 else (counts <= most * threads).all()
assert (values.bfloat16() > 0).to(torch.bfloat16).sum() > 49_000
PY
