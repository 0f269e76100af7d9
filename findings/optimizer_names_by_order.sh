#!/usr/bin/env bash
# torch 2.13.0: an optimizer that knows its parameters' names loads a state by their order all the same, and takes over the
# names.
#
# AdamW(model.named_parameters()) keeps names: they are in the groups and in state_dict(). One expects load_state_dict() to go
# by them, as a module's does, or to raise where they differ. It goes by the order. A model whose layers were made in another
# order (encoder and decoder, two heads, q and v), with the same names and shapes, loads its weights right and its moments
# crosswise. And the names of the checkpoint replace those of the optimizer: it now says "decoder" of the encoder's parameter,
# in the next checkpoint too, so that a load by names (torch's documentation shows one as a hook) is wrong from then on. Only
# numbers and sizes of groups are compared: other names, and other shapes, load as well. The documentation says in a note that
# names do not count.
#
# Seen, momentum 1 of encoder, 2 of decoder; loaded into an optimizer whose decoder comes first: encoder 2, decoder 1, names as
# saved; into parameters of other names: loaded; of another shape: loaded, and step() raises RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from torch import nn


def made(*names, size=2):
    """Return a model with a layer of each name, and its optimizer."""
    model = nn.ModuleDict({name: nn.Linear(size, size, bias=False) for name in names})
    return model, torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)


model, optimizer = made("encoder", "decoder")
for value, layer in enumerate(model.values(), start=1):
    layer.weight.grad = torch.full((2, 2), float(value))
optimizer.step()
saved = optimizer.state_dict()


def momentum(optimizer, layer):
    return optimizer.state[layer.weight]["momentum_buffer"][0, 0].item()


other, loaded = made("decoder", "encoder")
other.load_state_dict(model.state_dict())
assert all(torch.equal(other[name].weight, model[name].weight) for name in model)
own = loaded.param_groups[0]["param_names"]
loaded.load_state_dict(saved)
found = {name: momentum(loaded, other[name]) for name in ("encoder", "decoder")}
names = loaded.param_groups[0]["param_names"]
print("momentum", found, "names", own, "then", names)
assert found == {"encoder": 2.0, "decoder": 1.0}
assert own == ["decoder.weight", "encoder.weight"] and names == ["encoder.weight", "decoder.weight"]

strange, loaded = made("first", "second")
loaded.load_state_dict(saved)
assert momentum(loaded, strange["first"]) == 1.0

larger, loaded = made("encoder", "decoder", size=3)
loaded.load_state_dict(saved)
for layer in larger.values():
    layer.weight.grad = torch.ones(3, 3)
try:
    loaded.step()
    raise AssertionError
except RuntimeError as error:
    print("another shape:", str(error)[:60])
PY
