#!/usr/bin/env bash
# datasets 5.2.0 with torch 2.13.0: a streamed dataset that is shuffled without a seed has the same order in every epoch.
#
# stream.shuffle() without a seed is expected to do what a DataLoader with shuffle=True does, another order in each pass. It
# draws a seed once, when it is called, and each pass begins from that: ten epochs are one order, also through a DataLoader,
# with workers, and with interleave_datasets(probabilities=...). torch.manual_seed does not reach it: two processes with the
# same seed read in two orders. set_epoch(n) gives epoch n an order of its own. It is to be called on the very object that is
# read. Each map(), filter() or take() makes another one that keeps the epoch it was made with: set_epoch() on the stream before
# them changes nothing.
#
# Seen, 12 rows, orders of two passes: plain equal, DataLoader equal, one worker equal, interleaved equal; set_epoch(0) and
# set_epoch(1) on what is read differ; on the stream of which it was mapped equal; a second shuffle() after the same
# torch.manual_seed: another order
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 datasets==5.2.0
cat > "$folder/epochs.py" <<'PY'
import datasets
import torch
from torch.utils.data import DataLoader

rows = datasets.Dataset.from_dict({"row": list(range(12))}).to_iterable_dataset(num_shards=3)
others = datasets.Dataset.from_dict({"row": list(range(100, 112))}).to_iterable_dataset()


def shuffled():
    torch.manual_seed(0)
    return rows.shuffle(buffer_size=12)


def equal(read, begin=lambda epoch: None):
    """Tell whether two epochs have the same order."""
    orders = []
    for epoch in range(2):
        begin(epoch)
        orders.append([int(row["row"]) for row in read])
    assert len(set(orders[0])) >= 12
    return orders[0] == orders[1]


if __name__ == "__main__":
    stream = shuffled()
    mapped = stream.map(lambda row: row)
    found = {
        "plain": equal(shuffled()),
        "DataLoader": equal(DataLoader(shuffled(), batch_size=None)),
        "one worker": equal(DataLoader(shuffled(), batch_size=None, num_workers=1)),
        "interleaved": equal(datasets.interleave_datasets([rows, others], probabilities=[0.5, 0.5])),
        "set_epoch on what is read": equal(mapped, mapped.set_epoch),
        "set_epoch on what it was mapped of": equal(mapped, stream.set_epoch),
    }
    print({name: "equal" if same else "differ" for name, same in found.items()})
    assert list(found.values()) == [True, True, True, True, False, True]
    drawn = {tuple(row["row"] for row in shuffled()) for _ in range(5)}
    print("orders of 5 streams after the same torch.manual_seed:", len(drawn))
    assert len(drawn) > 1
PY
HF_HOME="$folder/home" "$folder/venv/bin/python" -W ignore "$folder/epochs.py" 2>/dev/null
