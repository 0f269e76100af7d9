#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.checkpoint: a number under an integer key is not loaded; it comes beside, under the text "0".
#
# State dicts have integer keys: an optimizer's {"state": {0: ...}}, counters by process, by layer, by epoch. save() makes one
# name of the path to a value, and load() takes the names apart again: 0 becomes "0". A tensor is written into the tensor that
# is there, so that all looks right. Whatever is not a tensor is set by its path: the dict gets another entry "0", and the value
# under 0 stays what it was before. An optimizer whose step is a Python number (transformers' Adafactor) has its moments from
# the checkpoint and its steps from the beginning. Nothing is missing, so strictness finds nothing; most of torch's own
# optimizers, whose steps are tensors, hide it. Keys that are text, and lists, are right.
#
# Seen, saved {0: 5, 1: tensor 7, "a": 6}, loaded into zeros: {0: 0, 1: tensor 7, "a": 6, "0": 5}; transformers' Adafactor after
# 4 steps: the loaded optimizer's moments are those saved, its step is 1 (that of the state it was loaded into)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.24.0
cat > "$folder/keys.py" <<'PY'
import sys

import torch
import torch.distributed.checkpoint as dcp
from transformers.optimization import Adafactor

values = {"values": {0: 0, 1: torch.tensor(0), "a": 0}, "list": [0, 0]}
dcp.save({"values": {0: 5, 1: torch.tensor(7), "a": 6}, "list": [8, 9]}, checkpoint_id=sys.argv[1] + "/values")
dcp.load(values, checkpoint_id=sys.argv[1] + "/values")
print(values)
assert values == {"values": {0: 0, 1: torch.tensor(7), "a": 6, "0": 5}, "list": [8, 9]}


def stepped(steps):
    """Return an optimizer after that many steps on a weight of ones."""
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Adafactor([weight], lr=0.1, relative_step=False, scale_parameter=False)
    for k in range(steps):
        weight.grad = torch.full((4, 4), 1.0 + k)
        optimizer.step()
    return optimizer


first, second = stepped(4), stepped(1)
dcp.save({"optimizer": first.state_dict()}, checkpoint_id=sys.argv[1] + "/optimizer")
loaded = {"optimizer": second.state_dict()}
dcp.load(loaded, checkpoint_id=sys.argv[1] + "/optimizer")
second.load_state_dict(loaded["optimizer"])
before, after = (optimizer.state[optimizer.param_groups[0]["params"][0]] for optimizer in (first, second))
rows = torch.equal(before["exp_avg_sq_row"], after["exp_avg_sq_row"])
print("Adafactor: moments loaded", rows, "step", before["step"], "loaded", after["step"])
assert rows and before["step"] == 4 and after["step"] == 1
PY
"$folder/venv/bin/python" -W ignore "$folder/keys.py" "$folder"
