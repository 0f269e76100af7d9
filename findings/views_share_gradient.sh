#!/usr/bin/env bash
# torch 2.13.0: of two parameters that are viewed and added, p.grad is one memory, and accumulated gradients are wrong.
#
# The sum's backward hands the same tensor to both sides, and a view's backward (view, reshape, t, squeeze, flatten) makes a
# view of it. A parameter without a gradient takes what arrives as its own when nobody else holds the tensor; each of the two
# views is held by nobody else, but their memory is one. The first backward is right. The next adds to p.grad in place, once for
# each parameter, and so counts twice; clip_grad_norm_ multiplies both in place, so that the norm is clipped twice. a + b
# without views, and views by indexing, are right. zero_grad() between backwards hides the accumulation, but not the clipping.
#
# Seen, weight = a.view(3, 4) + b.view(3, 4) with flat a and b: the same address; two equal backwards: 3 times the gradient of
# one (expected 2); clipped to norm 1, the norm of both is 0.09 instead of 1 (11.06 before); a + b of 3 x 4: all right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
from torch import nn
from torch.nn.functional import linear

x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def trained(name, shape, weight):
    """Return the ratio of two accumulated gradients to one, and the norm after clipping to 1."""
    a, b = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    linear(x, weight(a, b)).sum().backward()
    same, one = a.grad.data_ptr() == b.grad.data_ptr(), a.grad.clone()
    linear(x, weight(a, b)).sum().backward()
    ratios = [((p.grad * one).sum() / one.square().sum()).item() for p in (a, b)]
    a.grad = b.grad = None
    linear(x, weight(a, b)).sum().backward()
    before = nn.utils.clip_grad_norm_([a, b], 1.0).item()
    after = nn.utils.get_total_norm([a.grad, b.grad]).item()
    print(f"{name}: one memory {same}, two backwards {ratios}, norm {before:.2f}, clipped {after:.2f}")
    return same, [round(r, 4) for r in ratios], round(after, 2)


assert trained("no views", (3, 4), lambda a, b: a + b) == (False, [2.0, 2.0], 1.0)
assert trained("slices", (3, 4), lambda a, b: a[:] + b[:]) == (False, [2.0, 2.0], 1.0)
views = {
    "view": ((12,), lambda a, b: a.view(3, 4) + b.view(3, 4)),
    "reshape": ((12,), lambda a, b: a.reshape(3, 4) + b.reshape(3, 4)),
    "t": ((4, 3), lambda a, b: a.t() + b.t()),
    "squeeze": ((1, 3, 4), lambda a, b: a.squeeze(0) + b.squeeze(0)),
}
for name, (shape, weight) in views.items():
    assert trained(name, shape, weight) == (True, [3.0, 3.0], 0.09)
PY
