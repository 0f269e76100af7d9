#!/usr/bin/env bash
# torch 2.13.0: under FakeTensorMode(allow_non_fake_inputs=True), `real.add_(number)` and `real.sub_(number)` really change the
# values of a real tensor of any size; fill_, mul_, copy_, clamp_ and add_ of a tensor leave it alone. So code that is run
# "without values" (BatchNorm's num_batches_tracked.add_(1)) counts for real.
# Seen: "add_: 1.0 sub_: -1.0 fill_: 0.0 add_ of a tensor: 0.0 batches: 1". Exits non-zero if that changes.
set -eu
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"; "$dir/venv/bin/pip" install -q torch==2.13.0 numpy
"$dir/venv/bin/python" -W ignore - <<'P'
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
def after(change):
    real = torch.zeros(1000)
    with FakeTensorMode(allow_non_fake_inputs=True):
        change(real)
    return real[0].item()
added, taken = after(lambda t: t.add_(1)), after(lambda t: t.sub_(1))
filled, summed = after(lambda t: t.fill_(3)), after(lambda t: t.add_(torch.ones(1000)))
norm = nn.BatchNorm1d(3)
with FakeTensorMode(allow_non_fake_inputs=True):
    norm(torch.randn(4, 3))
batches = norm.num_batches_tracked.item()
print("add_:", added, "sub_:", taken, "fill_:", filled, "add_ of a tensor:", summed, "batches:", batches)
assert (added, taken, filled, summed, batches) == (1.0, -1.0, 0.0, 0.0, 1)
P
