#!/usr/bin/env bash
# torch 2.13.0: run_decompositions() of an exported program takes away every detach() and no_grad(), and so changes gradients.
#
# An exported program keeps what stops a gradient: detach() is an operator in it, and a no_grad() block a part of its own. So
# the program can be trained further, and gives the eager gradients. run_decompositions() is to replace operators by simpler
# ones, and is what one calls before a pass of one's own. Its result has neither: the values are the same, the gradient goes
# through what was stopped. A target network, a frozen statistic, a straight-through estimator train as another model. With an
# empty table of decompositions, which is to change nothing, detach() stays and no_grad() is lost.
#
# Seen, gradients of the weights 1.3 and 2.6: y * y.detach() eager 1.3, 2.6, exported the same, decomposed 2.6, 5.2; a factor
# made under no_grad() 2.6, 5.2, exported the same, decomposed, by an empty table too, 5.2, 10.4; a straight-through estimator
# 1, exported 1, decomposed 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from torch import nn


def detached(y):
    return y * y.detach()


def without_grad(y):
    with torch.no_grad():
        factor = 2 * y
    return factor * y


def straight_through(y):
    return y + (y.round() - y).detach()


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.3, 2.6]))
        self.function = function

    def forward(self, x):
        return self.function(self.weight * x)


def gradient(model):
    return torch.autograd.grad(model(x).sum(), list(model.parameters()))[0]


x = torch.ones(2)
for function, right, wrong, empty in (
    (detached, [1.3, 2.6], [2.6, 5.2], [1.3, 2.6]),
    (without_grad, [2.6, 5.2], [5.2, 10.4], [5.2, 10.4]),
    (straight_through, [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]),
):
    program = torch.export.export(Model(function), (x,))
    eager, exported = gradient(Model(function)), gradient(program.module())
    decomposed = gradient(program.run_decompositions().module())
    by_empty_table = gradient(torch.export.export(Model(function), (x,)).run_decompositions({}).module())
    print(f"{function.__name__}: eager {eager}, exported {exported}, decomposed {decomposed}, empty table {by_empty_table}")
    assert torch.allclose(eager, torch.tensor(right)) and torch.allclose(exported, eager)
    assert torch.allclose(decomposed, torch.tensor(wrong)) and torch.allclose(by_empty_table, torch.tensor(empty))
    assert torch.equal(program.run_decompositions().module()(x), Model(function)(x))
PY
