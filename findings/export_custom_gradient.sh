#!/usr/bin/env bash
# torch 2.13.0: a program made by torch.export has lost the gradient that a torch.autograd.Function defines for itself.
#
# A straight-through estimator, a reversed or a clipped gradient is a Function with a backward of its own. torch.export records
# what the forward computes, and derives the gradient from that: the record has the rounding, whose derivative is 0, and not the
# backward that was written to replace it. Outputs are the same, backward() passes, and nothing is said. With strict=True the
# same program has no gradient at all and raises in backward(). torch.jit.trace and torch.compile, from which one would guess,
# both keep the backward. A straight-through estimator written as y + (round(y) - y).detach() is exported right.
#
# Seen, gradient of a weight through a Function that rounds and multiplies the gradient by 3: eager 3, torch.jit.trace 3,
# torch.compile 3, torch.export 0, torch.export(strict=True) raises; of the form with detach(): eager 1, torch.export 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from torch import nn


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient


class Scaled(nn.Module):
    """Rounds x * weight, by a Function or by arithmetic."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.3, 2.6]))
        self.function = function

    def forward(self, x):
        y = self.weight * x
        return Rounded.apply(y) if self.function else y + (y.round() - y).detach()


def gradient(model, made):
    """Return the weight's gradient, its output being right, or None where backward() raises."""
    y = model(x)
    assert torch.equal(y, torch.tensor([1.0, 3.0])), made
    try:
        y.sum().backward()
    except RuntimeError:
        return None
    (weight,) = model.parameters()
    return weight.grad.tolist()


x = torch.ones(2)
seen = {
    "eager": gradient(Scaled(True), "eager"),
    "trace": gradient(torch.jit.trace(Scaled(True), (x,), check_trace=False), "trace"),
    "compile": gradient(torch.compile(Scaled(True), backend="aot_eager"), "compile"),
    "export": gradient(torch.export.export(Scaled(True), (x,)).module(), "export"),
    "export, strict": gradient(torch.export.export(Scaled(True), (x,), strict=True).module(), "strict"),
    "detach, eager": gradient(Scaled(False), "detach"),
    "detach, export": gradient(torch.export.export(Scaled(False), (x,)).module(), "detach"),
}
print(seen)
assert seen["eager"] == seen["trace"] == seen["compile"] == [3.0, 3.0]
assert seen["export"] == [0.0, 0.0] and seen["export, strict"] is None
assert seen["detach, eager"] == seen["detach, export"] == [1.0, 1.0]
PY
