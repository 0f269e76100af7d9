#!/usr/bin/env bash
# torch 2.13.0, CPU (built with MKL, x86): torch.sqrt of float32 is not always the nearest value, which IEEE 754 asks of
# a square root, and which numpy's, C's and the processor's own are. x ** 0.5 is the same function. So torch's Adam
# differs by a unit in the last place from the same formula in numpy, C or CUDA, for elements here and there.
#
# Seen: not the nearest value: numpy 0, torch.sqrt 6247, x ** 0.5 6247 of 1000000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import numpy
import torch

# fp64 has more than twice the bits of fp32: a root that is rounded twice is the nearest value
x = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0))
nearest = numpy.sqrt(x.double().numpy()).astype(numpy.float32)
by_numpy = int((numpy.sqrt(x.numpy()) != nearest).sum())
by_torch, by_power = int((x.sqrt().numpy() != nearest).sum()), int(((x**0.5).numpy() != nearest).sum())
print(f"not the nearest value: numpy {by_numpy}, torch.sqrt {by_torch}, x ** 0.5 {by_power} of {x.numel()}")
assert by_numpy == 0
assert by_torch > 0
PY
