#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.13.0: resumed in the midst of a shuffled epoch, some rows are read twice and others never.
#
# save_state() in an epoch; load_state() and skip_first_batches(loader, batches that were read) in the next process. One expects
# the rest of the epoch: the random state is saved too. It is saved where the training stood, after the epoch's order was drawn;
# the resumed loader draws a new order from there, and skips the first batches of that one. Numbers of batches and steps are
# right. DataLoaderConfiguration(use_stateful_dataloader=True), which needs no skipping, is the same. With
# use_seedable_sampler=True it is the first epoch's order, unless set_epoch() is called before, and the epoch after it has it
# again.
#
# Seen, rows 0 to 9 in single batches, saved after four batches of the second epoch, 2 4 9 8; the rest uninterrupted and
# resumed: default and stateful 7 5 6 1 0 3, 1 9 6 2 5 7 (9 and 2 again, 0 and 3 never); seedable, saved after 5 6 1 2: 0 8 9 3
# 7 4, 3 9 0 8 6 2; with set_epoch(1) 0 8 9 3 7 4
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 accelerate==1.15.0 torchdata==0.11.0
cat > "$folder/train.py" <<'PY'
import json
import os
import sys

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader, TensorDataset

kind, place = sys.argv[1:]
stateful = kind == "stateful"
config = DataLoaderConfiguration(use_seedable_sampler=kind.startswith("seedable"), use_stateful_dataloader=stateful)
accelerator = Accelerator(cpu=True, dataloader_config=config)
set_seed(0)
loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=1, shuffle=True)
layer = torch.nn.Linear(1, 1)
layer, optimizer, loader = accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), lr=0.1), loader)


def rows(batches):
    return [row.item() for (row,) in batches]


if not os.path.exists(place):  # the first process: two epochs, saved after four batches of the second
    rows(loader)
    read = []
    for (row,) in loader:
        read.append(row.item())
        if len(read) == 4:
            accelerator.save_state(place)
    with open(f"{place}/rows.json", "w") as file:
        json.dump(read, file)
else:
    accelerator.load_state(place)
    if kind == "seedable, set_epoch":
        loader.set_epoch(1)
    rest = rows(loader if stateful else skip_first_batches(loader, 4))
    with open(f"{place}/rows.json") as file:
        read = json.load(file)
    never = sorted(set(range(10)) - set(read[:4]) - set(rest))
    print(f"{kind}: read {read[:4]}, then {read[4:]}; resumed {rest}, never read {never}")
    if kind == "seedable, set_epoch":
        assert rest == read[4:]
    else:
        assert len(rest) == 6 and never and set(rest) & set(read[:4])
PY
for kind in default stateful seedable "seedable, set_epoch"; do
    "$folder/venv/bin/python" -W ignore "$folder/train.py" "$kind" "$folder/$kind" 2>/dev/null
    "$folder/venv/bin/python" -W ignore "$folder/train.py" "$kind" "$folder/$kind" 2>/dev/null
done
