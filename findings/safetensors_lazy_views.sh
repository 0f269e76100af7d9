#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0: a tensor that is a lazy conjugate or a lazy negative is saved without it.
#
# torch keeps x.conj() as a view of x with a conjugate bit, and the imaginary part of such a view as a real view with a
# negative bit. safetensors.torch writes the memory behind them and not their values, without an error: the real tensor
# [-2.0] comes back as [2.0]. torch.save keeps both. resolve_conj() and resolve_neg() before saving help.
#
# Seen: conjugate saved [(1-2j), (3+4j)] loaded [(1+2j), (3-4j)]; imaginary part saved [-2.0] loaded [2.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 safetensors==0.8.0 numpy packaging
"$folder/venv/bin/python" - <<'PY'
import torch
from safetensors.torch import load, save

conjugate = torch.tensor([1 + 2j, 3 - 4j]).conj()
imaginary = torch.tensor([1 + 2j]).conj().imag
for name, tensor, stored in [
    ("conjugate", conjugate, [1 + 2j, 3 - 4j]),
    ("imaginary part", imaginary, [2.0]),
]:
    loaded = load(save({"x": tensor}))["x"].tolist()
    print(f"{name} saved {tensor.tolist()} loaded {loaded}")
    assert loaded == stored != tensor.tolist()
assert load(save({"x": imaginary.resolve_neg()}))["x"].tolist() == [-2.0]
PY
