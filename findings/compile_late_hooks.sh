#!/usr/bin/env bash
# torch 2.13.0: a forward hook on a submodule that is registered after a compiled model's first call is never called.
#
# torch.compile looks at what a model consists of and compiles again when that changes: a replaced weight, a new block, another
# attribute, eval(), a forward that is set anew. Hooks are left out of it by default, for speed: the first one on a submodule
# changes nothing that is looked at. So hooks that log activations every thousand steps, take features, add to the residual
# stream or scale a layer see nothing and do nothing, and the model computes as if they were not there; no error, no warning. A
# hook on the outermost module does work, so do full backward hooks, and so does every hook that is there before the first call,
# and its removal. model.compile() is the same as torch.compile(model). torch._dynamo.config.skip_nnmodule_hook_guards = False
# helps.
#
# Seen, calls after two earlier ones of the compiled model, and whether the output is that of the plain model: forward hook on a
# layer 0, differs; pre-hook 0, differs; on the outermost module 1, equal; registered first 1, equal; with the guards 1, equal
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x):
        return self.layers(x)


def late(place, pre=False, method=False, first=False, guards=False):
    """Return how often a hook is called in one call of a compiled model, and whether its effect is there."""
    torch._dynamo.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = not guards
    torch.manual_seed(0)
    model, x, calls = Model(), torch.ones(1, 4), []
    compiled = torch.compile(model, backend="eager")
    if method:
        model.compile(backend="eager")
        compiled = model

    def hook(module, inputs, output=None):
        calls.append(1)
        return (inputs[0] + 1,) if pre else output + 1

    def register():
        module = model if place is None else model.layers[place]
        module.register_forward_pre_hook(hook) if pre else module.register_forward_hook(hook)

    if first:
        register()
    for _ in range(2):
        compiled(x)
    if not first:
        register()
    calls.clear()
    found, called = compiled(x), len(calls)
    with torch.compiler.set_stance("force_eager"):
        return called, torch.equal(found, compiled(x))


cases = {
    "forward hook on a layer": (late(0), (0, False)),
    "the same, model.compile()": (late(0, method=True), (0, False)),
    "pre-hook on a layer": (late(2, pre=True), (0, False)),
    "on the outermost module": (late(None), (1, True)),
    "pre-hook, model.compile()": (late(2, pre=True, method=True), (0, False)),
    "registered first": (late(0, first=True), (1, True)),
    "with the guards": (late(0, guards=True), (1, True)),
}
for name, (found, expected) in cases.items():
    print(f"{name}: called {found[0]}, {'equal' if found[1] else 'differs'}")
    assert found == expected, name
PY
