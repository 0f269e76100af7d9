#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.checkpoint: load() checks a tensor's size, and converts its dtype without a word.
#
# A weight of 70000 saved in fp32 is inf in a model that was put to fp16 before it is loaded, a step count of 300 is 44 in
# uint8. A shape that differs raises; load_state_dict of a module converts as well, but a training's state has counters,
# and masters that nothing casts back.
#
# Seen: w [1.0, inf] n [44]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/load.py" <<'PY'
import sys

import torch
import torch.distributed.checkpoint as dcp

place = f"{sys.argv[1]}/checkpoint"
dcp.save({"w": torch.tensor([1.0, 70000.0]), "n": torch.tensor([300])}, checkpoint_id=place)
into = {"w": torch.zeros(2, dtype=torch.float16), "n": torch.zeros(1, dtype=torch.uint8)}
dcp.load(into, checkpoint_id=place)
print("w", into["w"].tolist(), "n", into["n"].tolist())
assert into["w"].tolist() == [1.0, float("inf")]
assert into["n"].tolist() == [44]
PY
"$folder/venv/bin/python" -W ignore "$folder/load.py" "$folder" 2>/dev/null
