#!/usr/bin/env bash
# torch 2.13.0, CPU: of torch.randn, n values are not the first n of more values, though of torch.rand they are.
#
# Below 16 values they are made one by one; from 16 on sixteen at a time, from the same uniform numbers in another order, so
# that 15 values share nothing with 16. Where the length is no multiple of 16 the last sixteen are drawn again, over values
# that were there: 31 values share 15 with 32. So a weight that is initialised in parts,
# or padded and cut, is not the weight that is initialised whole, even where parts begin at the same state.
#
# Seen: values shared with the first n of randn(32): n=15: 0, 16: 16, 17: 1, 20: 4, 31: 15; of rand(32): all
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import torch


def shared(draw, n):
    some, more = (draw(m, generator=torch.Generator().manual_seed(0)) for m in (n, 32))
    return int((some == more[:n]).sum())


normal = {n: shared(torch.randn, n) for n in (15, 16, 17, 20, 31)}
uniform = {n: shared(torch.rand, n) for n in (15, 16, 17, 20, 31)}
print("randn", normal, "rand", uniform)
assert normal == {15: 0, 16: 16, 17: 1, 20: 4, 31: 15}
assert all(n == count for n, count in uniform.items())
PY
