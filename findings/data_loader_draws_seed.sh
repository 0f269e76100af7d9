#!/usr/bin/env bash
# torch 2.13.0: reading a DataLoader that neither shuffles nor has workers changes what the training draws after it.
#
# In order, in one process, without transforms there is nothing random, and one expects a pass over the validation set to leave
# a seeded training alone. Each iterator draws a seed for its workers from the global generator, whether it has workers or not.
# So the order of the next epoch and every dropout mask depend on how often somebody has evaluated, looked at a batch or counted
# one: a run with more evaluations is another run, and a comparison of two evaluation intervals compares two seeds. A loader
# with a generator of its own draws from that, and leaves the global one alone.
#
# Seen, manual_seed(0), three epochs of 8 shuffled rows, with and without a pass over an ordered loader after each: the first
# epoch is the same, the second and third are others; with generator=torch.Generator() for the ordered one all three are the
# same
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.utils.data import DataLoader

rows = list(range(8))


def orders(passes, **options):
    """Return the rows of three shuffled epochs, each followed by passes over an ordered loader."""
    torch.manual_seed(0)
    training, validation = DataLoader(rows, batch_size=1, shuffle=True), DataLoader(rows, batch_size=4, **options)
    found = []
    for _ in range(3):
        found.append([row.item() for row in training])
        for _ in range(passes):
            assert torch.cat(list(validation)).tolist() == rows
    return found


none, one, own = orders(0), orders(1), orders(1, generator=torch.Generator())
for name, found in (("no validation", none), ("a validation an epoch", one), ("with a generator of its own", own)):
    print(name, found)
assert own == none and one[0] == none[0] and one[1] != none[1] and one[2] != none[2]

torch.manual_seed(0)
before = torch.get_rng_state()
iter(DataLoader(rows, batch_size=4))
print("random state changed by iter() alone:", not torch.equal(before, torch.get_rng_state()))
assert not torch.equal(before, torch.get_rng_state())
PY
