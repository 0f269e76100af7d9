#!/usr/bin/env bash
# torch 2.13.0: copy.deepcopy of a ScriptModule, with gradients enabled, gives a module whose parameters are not leaves: they are
# clones with a grad_fn that leads to the original's parameters. A backward through the copy leaves nothing in the copy's
# parameters and adds to the original's .grad. (copy.deepcopy of the same nn.Module gives leaves.)
# Seen: "leaf: False CloneBackward0 / copy's grad: None / original's grad: True". Exits non-zero if that changes.
set -eu
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"; "$dir/venv/bin/pip" install -q torch==2.13.0 numpy
"$dir/venv/bin/python" -W ignore - <<'P'
import copy, torch
from torch import nn
original = torch.jit.script(nn.Linear(2, 2))
twin = copy.deepcopy(original)
weight = next(iter(twin.parameters()))
twin(torch.ones(1, 2)).sum().backward()
first = next(iter(original.parameters()))
print("leaf:", weight.is_leaf, type(weight.grad_fn).__name__)
print("copy's grad:", weight.grad, "/ original's grad:", first.grad is not None)
assert not weight.is_leaf and weight.grad is None and first.grad is not None
P
