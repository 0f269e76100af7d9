#!/usr/bin/env bash
# torch 2.13.0, CPU: parametrizations.orthogonal on a bf16 weight leaves it as it is, and it never becomes orthogonal.
#
# torch.nn.utils.parametrizations.orthogonal(layer) replaces the weight by an orthogonal one near it, and keeps it so in
# training. First it looks whether the weight is orthogonal already, with a tolerance of ten times its rows times the dtype's
# precision. In bf16 and 64 rows that is 5, where any weight as nn.Linear draws it is off by less than 1. So each passes, from
# 16 rows on (in fp16 from some hundred), and stays: its singular values are those that were drawn, nearly 0 to 1.1, and nothing
# is said. After a first step the bf16 weight was NaN here, as matrix_exp of 16-bit values is. Parametrised in fp32 and then
# converted, the weight is orthogonal to its precision.
#
# Seen, least and largest singular value: fp32, 64 rows 1.00, 1.00; bf16 0.01, 1.14, the very weight that was drawn; fp16, 512
# rows 0.00, 1.15; parametrised in fp32 and then bf16 1.00, 1.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.nn.utils.parametrizations import orthogonal


def extremes(layer):
    values = torch.linalg.svdvals(layer.weight.detach().double())
    return values.min().item(), values.max().item()


def drawn(rows, dtype):
    torch.manual_seed(0)
    return torch.nn.Linear(rows, rows, bias=False).to(dtype)


found = {
    "fp32": extremes(orthogonal(drawn(64, torch.float32))),
    "bf16": extremes(orthogonal(drawn(64, torch.bfloat16))),
    "fp16, 512 rows": extremes(orthogonal(drawn(512, torch.float16))),
    "fp32, then bf16": extremes(orthogonal(drawn(64, torch.float32)).to(torch.bfloat16)),
}
for name, (least, most) in found.items():
    print(f"{name}: {least:.3f} to {most:.3f}")
for name in ("fp32", "fp32, then bf16"):
    assert 0.98 < found[name][0] and found[name][1] < 1.02
for name in ("bf16", "fp16, 512 rows"):
    assert found[name][0] < 0.2 and found[name][1] > 1.05
assert torch.equal(orthogonal(drawn(64, torch.bfloat16)).weight, drawn(64, torch.bfloat16).weight)
PY
