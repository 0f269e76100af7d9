#!/usr/bin/env bash
# torch 2.13.0: with set_swap_module_params_on_conversion(True) a conversion leaves a parameter without its hooks.
#
# This switch of torch.__future__ makes module.to(), .half() and the like exchange a parameter's content instead of setting its
# .data, so that tensor subclasses can be converted. It remains the same object, and optimizers find it as before. But its
# hooks are exchanged away with the old content, both kinds, and so are attributes that were set on it. An optimizer that
# steps in a hook on the parameter (to free gradients early) does not step any more, silently, and weights stay where they are;
# clipping in a hook ends as well. Without the switch, which is the default, hooks and attributes stay.
#
# Seen, after module.double() and a backward, calls of a tensor hook and of a post-accumulate hook: default 1 1, weight moved;
# with the switch 0 0, weight did not move; in both cases the same object
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
from torch import nn


def converted(switch):
    """Return what is left of a parameter's hooks after double(): calls of each kind, whether it moved, its attribute."""
    torch.__future__.set_swap_module_params_on_conversion(switch)
    module = nn.Linear(2, 2)
    weight = module.weight
    weight.group = "matrices"
    optimizer = torch.optim.SGD([weight], lr=0.1)
    calls = {"tensor": 0, "post-accumulate": 0}

    def seen(gradient):
        calls["tensor"] += 1

    def step(parameter):
        calls["post-accumulate"] += 1
        optimizer.step()

    weight.register_hook(seen)
    weight.register_post_accumulate_grad_hook(step)
    module.double()
    before = weight.detach().clone()
    module(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    assert module.weight is weight and weight.dtype == torch.float64 and weight.grad is not None
    found = list(calls.values()), not torch.equal(before, weight), getattr(weight, "group", None)
    print(f"switch {switch}: calls {calls}, moved {found[1]}, attribute {found[2]}")
    return found


assert converted(False) == ([1, 1], True, "matrices")
assert converted(True) == ([0, 0], False, None)
PY
