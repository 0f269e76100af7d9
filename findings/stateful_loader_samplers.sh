#!/usr/bin/env bash
# torchdata 0.11.0 with torch 2.13.0: a StatefulDataLoader that resumes with torch's own SubsetRandomSampler reads other rows.
#
# A StatefulDataLoader is there to go on in the midst of an epoch. With shuffle=True it does, in a process with another seed as
# well: the order's generator is in the state. A sampler that is given may be any; where it has no state of its own, the loader
# counts, and skips as many of what a new iteration yields. torch's SubsetRandomSampler, the usual one for a split by indices,
# draws a new order from the global generator, and so does every sampler of one's own that calls torch.randperm. So of the
# epoch's rest some rows come twice and others never. No error, no warning; the number of batches is right. With the same seed
# the first epoch is right by chance, since the draw is the same one, so that a short test passes, and the second is not.
#
# Seen, 10 rows, saved after 4 batches of the second epoch: shuffle=True: the rest is the right one; SubsetRandomSampler: 9 2 1
# 7 were read, uninterrupted 4 0 3 5 6 8, resumed with the same seed 0 8 1 6 9 4, with another 3 1 0 7 8 5. Saved in the first
# epoch: right with the same seed, wrong with another
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchdata==0.11.0
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from torch.utils.data import SubsetRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader


def loader(seed, shuffle):
    """Return what a process makes at its start."""
    torch.manual_seed(seed)
    chosen = {"shuffle": True} if shuffle else {"sampler": SubsetRandomSampler(range(10))}
    return StatefulDataLoader(range(10), batch_size=1, **chosen)


def resumed(shuffle, epoch, seed):
    """Return the rows read before saving, the rest of that epoch, and the rest that a new process reads."""
    first = loader(0, shuffle)
    for _ in range(epoch):
        list(first)
    batches = iter(first)
    read = [next(batches).item() for _ in range(4)]
    state = first.state_dict()
    second = loader(seed, shuffle)
    second.load_state_dict(state)
    return read, [row.item() for row in batches], [row.item() for row in second]


for shuffle, epoch, seed, right in (
    (True, 1, 1, True),
    (False, 0, 0, True),
    (False, 0, 1, False),
    (False, 1, 0, False),
    (False, 1, 1, False),
):
    read, rest, found = resumed(shuffle, epoch, seed)
    print(f"shuffle {shuffle}, epoch {epoch}, seed {seed}: read {read}, then {rest}; resumed {found}")
    assert len(found) == 6 and (found == rest) == right
    if not right:
        assert set(found) & set(read)
PY
