#!/usr/bin/env bash
# torch 2.13.0: copy.deepcopy of a model leaves out its parameters' hooks, gradients and all attributes that were set on them.
#
# A copy of a model (for an average, a teacher, each replica of a pipeline, each trial of a search) is taken to be as the model.
# Its modules are, with their hooks. Of a parameter the values and requires_grad are copied and nothing else: the hook that
# keeps frozen rows of an embedding at gradient 0 is gone, so the copy trains them; a mark such as weight._no_weight_decay, by
# which libraries group parameters, is gone, so the copy decays it; and p.grad is None. torch.save and torch.load keep
# attributes; copy.deepcopy of a plain tensor with requires_grad keeps attributes and gradient. So three ways of copying differ
# in what they keep, without a word. AveragedModel copies by deepcopy.
#
# Seen, attribute, gradient, gradient of a row that a hook masks: the model True, True, 0; deepcopy False, False, 3; saved and
# loaded True, False, 3; AveragedModel False; a plain tensor's deepcopy True, True; forward hooks of the module are called in
# the deepcopy
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import copy
import io

import torch
from torch.optim.swa_utils import AveragedModel


def masked(gradient):
    gradient = gradient.clone()
    gradient[0] = 0
    return gradient


def frozen_row(model):
    """Return the sum of the gradient of a row that is to stay as it is."""
    model.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    return model.weight.grad[0].sum().item()


def state(model):
    marked, has_gradient = hasattr(model.weight, "_no_weight_decay"), model.weight.grad is not None
    return marked, has_gradient, frozen_row(model)


calls = []
model = torch.nn.Linear(3, 2)
model.weight._no_weight_decay = True
model.weight.register_hook(masked)
assert frozen_row(model) == 0
average = AveragedModel(model)
file = io.BytesIO()
torch.save(model, file)
file.seek(0)
saved = torch.load(file, weights_only=False)
model.register_forward_hook(lambda *arguments: calls.append(1))
copied = copy.deepcopy(model)
found = {"model": state(model), "deepcopy": state(copied), "saved and loaded": state(saved)}
print(found, "AveragedModel", hasattr(average.module.weight, "_no_weight_decay"))
assert found == {"model": (True, True, 0), "deepcopy": (False, False, 3), "saved and loaded": (True, False, 3)}
assert not hasattr(average.module.weight, "_no_weight_decay")
calls.clear()
copied(torch.ones(1, 3))
assert calls == [1]

plain = torch.ones(2, requires_grad=True)
plain.mark = True
plain.sum().backward()
again = copy.deepcopy(plain)
print("a plain tensor's deepcopy:", hasattr(again, "mark"), again.grad is not None)
assert hasattr(again, "mark") and again.grad is not None
PY
