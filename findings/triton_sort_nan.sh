#!/usr/bin/env bash
# triton 3.9.0: with one NaN in a row, tl.sort loses the NaN, or all the other values, or the order.
#
# The bitonic network compares each pair twice, once from each side, with `x > y`. A comparison with NaN is false from both
# sides, so one side keeps its own value and the other takes its neighbour's: the same value is there twice. Where the NaN
# stands decides what is left: it may vanish, so that a check of the sorted row for NaN finds nothing, or overwrite the
# row. tl.topk, which uses the same network, may lose one of the largest values. torch.sort counts NaN as the largest and
# keeps every value. (Run interpreted: the network is written in Triton itself, so what is compiled compares the same.)
#
# Seen: [1, nan, 3, -2] gives [-2, 1, 1, 3]; [nan, 5, 4, 7] gives four NaN, and 7, 4 as its top two (the 5 is lost);
# [4, 7, 5, nan] gives [4, 7, 4, 7], which is not even in order; torch.sort keeps all values and ends in NaN
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.9.0 numpy==2.2.6
cat > "$folder/order.py" <<'PY'
import math

import torch
import triton
import triton.language as tl


@triton.jit
def order(x, out, top, N: tl.constexpr):
    i = tl.arange(0, N)
    row = tl.load(x + i)
    tl.store(out + i, tl.sort(row))
    tl.store(top + tl.arange(0, 2), tl.topk(row, 2))


seen = {}
for values in ([1.0, math.nan, 3.0, -2.0], [math.nan, 5.0, 4.0, 7.0], [4.0, 7.0, 5.0, math.nan]):
    x = torch.tensor(values)
    out, top = torch.zeros(4), torch.zeros(2)
    order[(1,)](x, out, top, 4)
    print(values, "sorted", out.tolist(), "top two", top.tolist(), "torch", x.sort().values.tolist())
    assert x.sort().values[-1].isnan() and x.sort().values[:3].isfinite().all()
    seen[str(values)] = out.tolist(), top.tolist()
vanished, overwritten, disordered = seen.values()
assert vanished[0] == [-2.0, 1.0, 1.0, 3.0]
assert all(map(math.isnan, overwritten[0])) and overwritten[1] == [7.0, 4.0]
assert disordered[0] == [4.0, 7.0, 4.0, 7.0]
PY
TRITON_INTERPRET=1 TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/order.py" 2> "$folder/log" || {
  tail -5 "$folder/log"
  exit 1
}
