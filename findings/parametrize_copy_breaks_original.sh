#!/usr/bin/env bash
# torch 2.13.0: parametrizations that are removed from a copy of a model take the weight away from the original as well.
#
# Weights are folded for export or a fast evaluation on a copy, so that the training goes on: copy.deepcopy(model), or an
# average, and remove_parametrizations(copy.layer, "weight"). The copy is right. register_parametrization gives a layer a class
# of its own, with the weight as a property, and deepcopy copies the object, not its class. Removing deletes the property from
# the class that the original still has: its next forward raises AttributeError, in the training loop, far from the line that
# did it; parameters and state_dict() are all there. Registering on the copy breaks the original too (KeyError). Copies made by
# load_state_dict into a layer that was parametrised by itself are independent.
#
# Seen, weight_norm on a linear layer, then on its deepcopy: removed: copy Linear with the same outputs, original
# AttributeError; from AveragedModel's module: original AttributeError; bias parametrised: original KeyError; removed from a
# layer of its own: both right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import copy

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from torch.optim.swa_utils import AveragedModel

x = torch.ones(1, 3)


def own(layer):
    loaded = weight_norm(nn.Linear(3, 3))
    loaded.load_state_dict(layer.state_dict())
    return loaded


def after(make, change):
    """Return what the original does after a change to its copy, whose outputs are to be the same."""
    layer = weight_norm(nn.Linear(3, 3))
    y, copied = layer(x), make(layer)
    change(copied)
    assert torch.allclose(copied(x), y)
    assert len(list(layer.parameters())) == 3
    assert len(layer.state_dict()) == 3
    try:
        return "right" if torch.equal(layer(x), y) else "another output"
    except (AttributeError, KeyError) as error:
        return type(error).__name__


def remove(layer):
    remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear


found = {
    "removed from a deepcopy": after(copy.deepcopy, remove),
    "removed from an average": after(lambda layer: AveragedModel(layer).module, remove),
    "registered on a deepcopy": after(copy.deepcopy, lambda c: register_parametrization(c, "bias", nn.Identity())),
    "removed from a layer of its own": after(own, remove),
}
for name, what in found.items():
    print(f"{name}: original {what}")
assert list(found.values()) == ["AttributeError", "AttributeError", "KeyError", "right"]
PY
