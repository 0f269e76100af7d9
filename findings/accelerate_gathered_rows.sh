#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.13.0: on one process gather_for_metrics() drops tokens and rows of an evaluation's last batch.
#
# It gathers all processes' values and takes away the rows with which the last batch was filled up, on a distributed system, as
# its documentation has it. On one process there is nothing to gather or to take away, and one expects what one gave. But
# in the last batch whatever is given is cut to the first (length of the dataset) % (batch size) elements. Of losses per
# token that are flattened most are lost, of stacked counts (correct, tokens) one, and a mean over the epoch is off without a
# word. The length is the dataset's and not the sampler's: where a sampler reads a part of it, whole rows of a full last
# batch are lost. With as many rows as batches hold it gives back what it was given, so a test on round numbers is green.
#
# Seen, 9 rows of 5 tokens in batches of 4, given and got: 20 20, 20 20, 5 1; mean loss 7.22 instead of 8.0; counts [3, 5] [3];
# a sampler of 8 of 10 rows in batches of 4: 4 4, 4 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, SubsetRandomSampler

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 1


def sizes(rows, value, **options):
    """Return the numbers of elements that were given and got in each batch, and all that were got."""
    counts, got = [], []
    for batch in accelerator.prepare(DataLoader(torch.arange(rows, dtype=torch.float32), batch_size=4, **options)):
        given = value(batch)
        got.append(accelerator.gather_for_metrics(given))
        counts.append((len(given), len(got[-1])))
    return counts, torch.cat(got)


tokens, losses = sizes(9, lambda rows: 2 * rows.repeat_interleave(5))
print(f"flattened losses, given and got: {tokens}; their mean {losses.mean():.2f}, of all {2 * torch.arange(9.0).mean()}")
assert tokens == [(20, 20), (20, 20), (5, 1)] and abs(losses.mean() - 7.22) < 0.01
counts, _ = sizes(9, lambda rows: torch.tensor([3.0, 5.0]))
print("correct and number of tokens:", counts)
assert counts == [(2, 2), (2, 2), (2, 1)]
rows, _ = sizes(9, lambda rows: rows)
assert rows == [(4, 4), (4, 4), (1, 1)]
sampled, _ = sizes(10, lambda rows: rows, sampler=SubsetRandomSampler(range(8)))
print("a sampler of 8 of 10 rows:", sampled)
assert sampled == [(4, 4), (4, 2)]
PY
