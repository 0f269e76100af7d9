#!/usr/bin/env bash
# torch 2.13.0, CPU: every new shape of a 16-bit product takes up to 0.7 MB of the process for good, up to 1,024 shapes.
#
# Two caches keep the last 1,024 shapes each, and nothing of them is freed with the tensors: oneDNN's, one for the process,
# has compiled code; torch's own (ideep), one for each thread, has descriptions of products, which are 0.26 MB each. A
# mixture of experts has other numbers of rows for each expert in every layer, so that it meets them all within a step or
# two, and the process grows by up to 0.8 GB beside all tensors, and by 0.27 GB more for each further thread that
# multiplies. ONEDNN_PRIMITIVE_CACHE_CAPACITY=64 and LRU_CACHE_CAPACITY=64 in the environment keep 64 of each. Both are read
# once, at the first product. (A shape that is met again is compiled again then: 0.8 ms in fp16, 4 ms in bf16.)
#
# Seen, bf16, 1,024 products of r x 512 x 256 with r from 64 on, on an Emerald Rapids class Xeon: 726 MiB; with the first
# variable 305, with the second 475, with both 47. On a CPU without products of bf16 there is nothing to see.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat >"$folder/shapes.py" <<'PY'
import ctypes

import torch


def held_mib():
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) >> 10


w, x = torch.randn(512, 256, dtype=torch.bfloat16), torch.randn(1088, 512, dtype=torch.bfloat16)
torch.mm(x[:5], w)
before = held_mib()
for rows in range(64, 1088):
    torch.mm(x[:rows], w)
print(held_mib() - before)
PY
if ! grep -q avx512_bf16 /proc/cpuinfo; then
  echo "this CPU has no bf16 products" && exit
fi
many=$("$folder/venv/bin/python" "$folder/shapes.py")
few=$(ONEDNN_PRIMITIVE_CACHE_CAPACITY=64 "$folder/venv/bin/python" "$folder/shapes.py")
both=$(LRU_CACHE_CAPACITY=64 ONEDNN_PRIMITIVE_CACHE_CAPACITY=64 "$folder/venv/bin/python" "$folder/shapes.py")
echo "kept after 1,024 shapes: $many MiB; with 64 in oneDNN's cache: $few MiB; with 64 in both: $both MiB"
((many > 400 && few < many * 2 / 3 && both < few / 3))
