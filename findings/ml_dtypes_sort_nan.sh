#!/usr/bin/env bash
# ml_dtypes 0.6.0 with numpy 2.4.6: numpy.sort of bfloat16 leaves an array with a NaN in it unsorted.
#
# numpy puts NaN last when it sorts floats, and what is built on that (median, percentile, searchsorted, unique, a top k by
# argsort) relies on it. For bfloat16 and the 8-bit floats numpy falls back to plain comparisons, where NaN is less than nothing and
# more than nothing. The NaN stays in the midst, and values to its left are not compared with those to its right: two sorted
# pieces instead of one. No warning, and what is cut off at the end need not be the largest. unique() returns every NaN by
# itself. A cast to fp32 before it is exact, and helps.
#
# Seen, of [3, NaN, 1, 2]: float16 1 2 3 nan; bfloat16 and float8_e5m2 3 nan 1 2. 256 different values of
# which one is NaN: float16 has it last; bfloat16 at place 28, and beyond it the values begin again from the smallest
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 ml_dtypes==0.6.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import ml_dtypes
import numpy as np

values = np.random.default_rng(0).permutation(256).astype(np.float32)
values[100] = np.nan
for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2):
    name = np.dtype(dtype).name
    few = np.sort(np.array([3, np.nan, 1, 2], dtype)).astype(np.float32)
    many = np.sort(values.astype(dtype)).astype(np.float32)
    order = int((np.diff(many[~np.isnan(many)]) < 0).sum())
    place = int(np.flatnonzero(np.isnan(many))[0])
    alone = len(np.unique(np.array([np.nan] * 3 + [1], dtype)))
    print(f"{name}: {few.tolist()}; of 256 with a NaN: it lies at {place}, neighbours out of order {order}; unique {alone}")
    if dtype is np.float16:
        assert few[:3].tolist() == [1, 2, 3] and (order, place, alone) == (0, 255, 2)
    else:
        assert few[[0, 2, 3]].tolist() == [3, 1, 2] and place < 255 and order > 0 and alone == 4
PY
