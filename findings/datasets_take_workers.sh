#!/usr/bin/env bash
# datasets 5.2.0 with torch 2.13.0: take(n) and skip(n) of a streamed dataset are other rows under another num_workers.
#
# stream.take(n) for validation and stream.skip(n) for training is how a stream is split. In a DataLoader's worker each counts by
# itself: the worker has some of the shards, and takes or skips its part of n from them. So which rows are held out
# depends on the number of workers of the loader that reads them. Two loaders with as many workers fit together. With none for
# the validation and two for the training, as is usual, training sees rows of the validation, and others are in neither. The
# numbers of rows are right in both, and nothing is said. split_dataset_by_node divides n in the same way.
#
# Seen, rows 0 to 39 in 4 shards, take(10): no or 1 worker 0-9; 2 workers 0-4 10-14; 4 workers 0-2 10-12 20 21 30 31; take(10)
# without workers beside skip(10) with 2: rows 5 to 9 are in both, 10 to 14 in neither
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy datasets==5.2.0
cat > "$folder/split.py" <<'PY'
from datasets import Dataset
from torch.utils.data import DataLoader


def read(stream, workers):
    return sorted(row for batch in DataLoader(stream, batch_size=4, num_workers=workers) for row in batch["id"].tolist())


if __name__ == "__main__":
    rows = Dataset.from_dict({"id": list(range(40))}).to_iterable_dataset(num_shards=4).with_format("torch")
    held_out = {workers: read(rows.take(10), workers) for workers in (0, 1, 2, 4)}
    for workers, found in held_out.items():
        print(f"take(10) with {workers} workers: {found}")
    assert held_out[0] == held_out[1] == list(range(10)) and all(len(found) == 10 for found in held_out.values())
    assert held_out[2] == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14] and held_out[4] == [0, 1, 2, 10, 11, 12, 20, 21, 30, 31]
    trained = read(rows.skip(10), 2)
    both, neither = set(held_out[0]) & set(trained), set(range(40)) - set(held_out[0]) - set(trained)
    print("take(10) without workers, skip(10) with 2: in both", sorted(both), "in neither", sorted(neither))
    assert len(trained) == 30 and both == {5, 6, 7, 8, 9} and neither == {10, 11, 12, 13, 14}
    assert not set(held_out[2]) & set(trained)
PY
"$folder/venv/bin/python" -W ignore "$folder/split.py"
