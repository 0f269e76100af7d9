#!/usr/bin/env bash
# ml_dtypes 0.6.0 with numpy 2.4.6: numpy.mean of 10,000 ones in bfloat16 is 0.0256.
#
# numpy's float16 is summed in pieces, and mean() widens it to fp32, so that both are right here, and one expects the other 16-bit
# type to be treated alike. ml_dtypes adds its types to numpy from outside: their sum is a plain loop that rounds after each
# addition, so it stops growing at 256 in bfloat16, at 16 in float8_e4m3fn and at 8 in float8_e5m2, and mean() divides that by
# the number of elements. cumsum, add.at and add.reduceat are the same loop. dot and matmul add in fp32 and are right, so one
# way of adding up agrees with the truth where the other is wrong by a factor of 39. sum(dtype=numpy.float32) and
# mean(dtype=numpy.float32) are right.
#
# Seen, 10,000 ones (float16, bfloat16, float8_e4m3fn, float8_e5m2): sum 10000, 256, 16, 8; mean 1, 0.026, 0.002, 0.0009;
# mean with dtype=float32 1, 1, 1, 1; dot of bfloat16 10000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 ml_dtypes==0.6.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import ml_dtypes
import numpy as np

sums = {np.float16: 10_000, ml_dtypes.bfloat16: 256, ml_dtypes.float8_e4m3fn: 16, ml_dtypes.float8_e5m2: 8}
for dtype, expected in sums.items():
    ones = np.ones(10_000, dtype)
    total, mean = float(ones.sum()), float(ones.mean())
    wide = float(ones.mean(dtype=np.float32))
    print(f"{np.dtype(dtype).name}: sum {total:g}, mean {mean:.2g}, mean in fp32 {wide:g}")
    assert total == expected and abs(mean - expected / 10_000) < 0.3 * mean and wide == 1
ones = np.ones(10_000, ml_dtypes.bfloat16)
added = np.zeros(1, ml_dtypes.bfloat16)
np.add.at(added, np.zeros(10_000, int), ones)
pieces = np.add.reduceat(ones, [0])
print(f"bfloat16: cumsum {ones.cumsum()[-1]}, add.at {added[0]}, add.reduceat {pieces[0]}, dot {ones @ ones}")
assert float(ones.cumsum()[-1]) == float(added[0]) == float(pieces[0]) == 256 and float(ones @ ones) in (9984, 10_000)
PY
