#!/usr/bin/env bash
# torch 2.13.0, CPU: a cast to torch.float8_e8m0fnu, the dtype of microscaling formats' scales, keeps no sign and no zero.
#
# The format has an exponent and nothing else. The cast does not refuse what it cannot hold: -4 becomes 4, 0 becomes 2^-127,
# and a finite value over 1.5 * 2^127 becomes NaN, not the largest value. Between two powers of two it goes to the nearer
# one, and from the middle always up (1.5 to 2, 3 to 4): no rounding to even, and not the rounding up that would keep
# a block's largest value in range.
#
# Seen: [-4, -1.5, 0, 1.4, 1.5, 2.9, 3, 3e38] gives [4, 2, 5.9e-39, 1, 2, 2, 4, nan]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import torch

values = [-4.0, -1.5, 0.0, 1.4, 1.5, 2.9, 3.0, 3e38]
for dtype in (torch.float32, torch.bfloat16):
    found = torch.tensor(values, dtype=dtype).to(torch.float8_e8m0fnu).float()
    print(dtype, found.tolist())
    assert found[:-1].tolist() == [4.0, 2.0, 2.0**-127, 1.0, 2.0, 2.0, 4.0] and found[-1].isnan()
PY
