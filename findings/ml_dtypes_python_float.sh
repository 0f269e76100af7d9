#!/usr/bin/env bash
# ml_dtypes 0.6.0 with numpy 2.4.6: a bfloat16 array times 2 is bfloat16, times 2.0 float32, and where(..., 0.0) gives float64.
#
# In numpy 2 a Python number takes the array's dtype: a float16 array times 2.0 is float16. The dtypes of ml_dtypes follow that
# for Python integers, and not for Python floats: bfloat16 and the 8-bit floats become float32, int4 times 2 becomes int8, times
# 2.0 float16. So a + 1 and a + 1.0 are different numbers, and an array that was to save memory has twice or four times the
# bytes after one line. In place (a *= 2.0) it stays. A numpy integer makes float64 of it.
#
# Seen, bfloat16 array a: a * 2 bfloat16, a * 2.0 float32, a / 2 bfloat16, a / 2.0 float32, maximum(a, 0.0) float32, where(a >
# 0, a, 0.0) float64, a * numpy.int64(2) float64; 256 + 1 is 256, 256 + 1.0 is 257; float8_e4m3fn * 2.0 float32; int4 * 2 int8,
# int4 * 2.0 float16; float16 for all of the first six where a is float16
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ml_dtypes==0.6.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy as np

forms = {
    "a * 2": lambda a: a * 2,
    "a / 2": lambda a: a / 2,
    "a * 2.0": lambda a: a * 2.0,
    "a / 2.0": lambda a: a / 2.0,
    "maximum": lambda a: np.maximum(a, 0.0),
    "where": lambda a: np.where(a > 0, a, 0.0),
    "numpy.int64": lambda a: a * np.int64(2),
}


def dtypes(dtype):
    return {name: str(form(np.ones(3, dtype)).dtype) for name, form in forms.items()}


seen, own = dtypes(ml_dtypes.bfloat16), dtypes(np.float16)
print("bfloat16", seen, "float16", own)
assert list(seen.values()) == ["bfloat16", "bfloat16", "float32", "float32", "float32", "float64", "float64"]
assert list(own.values()) == ["float16"] * 6 + ["float64"]
a = np.full(3, 256, ml_dtypes.bfloat16)
print("256 + 1 is", a[0] + 1, "and 256 + 1.0", a[0] + 1.0)
assert (a + 1 == 256).all() and (a + 1.0 == 257).all()
a *= 2.0
assert a.dtype == ml_dtypes.bfloat16
byte, four = np.ones(3, ml_dtypes.float8_e4m3fn), np.ones(3, ml_dtypes.int4)
print("float8_e4m3fn * 2, 2.0:", (byte * 2).dtype, (byte * 2.0).dtype, "int4 * 2, 2.0:", (four * 2).dtype, (four * 2.0).dtype)
assert (byte * 2).dtype == byte.dtype and (byte * 2.0).dtype == np.float32
assert (four * 2).dtype == np.int8 and (four * 2.0).dtype == np.float16
PY
