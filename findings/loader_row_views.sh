#!/usr/bin/env bash
# torch 2.13.0: a DataLoader's worker that returns a row of a tensor puts the whole tensor into shared memory, each worker anew.
#
# A dataset that holds its data in one tensor returns self.data[i], a view. The default collate function copies rows into a
# batch. With batch_size=None, or a collate_fn that makes a list (boxes, sequences of unequal lengths), the view itself goes to
# the main process, and what goes there is the memory behind it: all of the data. The main process's own copy is shared with the
# workers by fork, so one expects a row's bytes; but each worker copies the whole tensor to shared memory at its first row, and
# n workers hold n of them. Every row that is kept keeps one alive, and torch.save of a row writes them all.
# self.data[i].clone() is right.
#
# Seen, 1,000 rows of 4,000 bytes, read by 2 workers, shared memory behind what arrives: default batches of 4: 16,000 bytes a
# batch; batch_size=None, and a list: 2 times 4,000,000; with clone() 4,000 a row
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/rows.py" <<'PY'
import torch
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset):
    def __init__(self, clone=False):
        self.data, self.clone = torch.zeros(1000, 1000), clone

    def __len__(self):
        return 100

    def __getitem__(self, index):
        row = self.data[index]
        return row.clone() if self.clone else row


def memory(dataset, **options):
    """Return the distinct pieces of shared memory behind what two workers return, in bytes."""
    loader = DataLoader(dataset, num_workers=2, multiprocessing_context="fork", **options)
    kept = [row for batch in loader for row in (batch if isinstance(batch, list) else [batch])]
    assert all(row.is_shared() for row in kept)
    pieces = {row.untyped_storage().data_ptr(): row.untyped_storage().nbytes() for row in kept}
    return len(pieces), max(pieces.values())


cases = {
    "default batches of 4": (memory(Rows(), batch_size=4), (25, 16000)),
    "batch_size=None": (memory(Rows(), batch_size=None), (2, 4000000)),
    "lists of 4": (memory(Rows(), batch_size=4, collate_fn=list), (2, 4000000)),
    "batch_size=None, clone()": (memory(Rows(clone=True), batch_size=None), (100, 4000)),
}
for name, (found, expected) in cases.items():
    print(f"{name}: {found[0]} of {found[1]} bytes")
    assert found == expected, name
PY
"$folder/venv/bin/python" -W ignore "$folder/rows.py" 2>/dev/null
