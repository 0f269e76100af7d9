#!/usr/bin/env bash
# torch 2.13.0: with persistent_workers=True a seed set before an epoch has no effect on the workers' draws, but in the first.
#
# A DataLoader gives its workers a new seed for each epoch, drawn from the process's generator or from its own. So
# torch.manual_seed(epoch) before an epoch makes its augmentations repeatable, and so does the generator's state that was put
# back for a resumed run. Workers that persist get a seed in the first epoch alone, and draw on from there: what an epoch draws
# depends on how many came before it in this process. A run that is resumed after epoch 1, all states put back, has other
# augmentations than the run that went on. The switch is said to save the start of workers. The main process draws no seed
# either, from the second epoch on, so that the model's own draws after the epoch (dropout) differ from those without the
# switch.
#
# Seen, torch.manual_seed(0) before each of 3 epochs, 4 rows: 3 times the same draws of workers that end, 3 different ones of
# persistent ones (the first equal to the others'); a draw of the main process after each epoch: 0.088, 0.088, 0.088 and 0.088,
# 0.496, 0.496
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/read.py" <<'PY'
import torch
from torch.utils.data import DataLoader, Dataset


class Augmented(Dataset):
    """4 rows, each a random number."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.rand(())


def epochs(generator, **options):
    """Return what 3 epochs draw, and the process after each, with the seed set before each."""
    loader = DataLoader(Augmented(), batch_size=2, num_workers=2, generator=generator, **options)
    rows, after = [], []
    for _ in range(3):
        torch.manual_seed(0)
        if generator is not None:
            generator.manual_seed(0)
        rows.append([round(value, 3) for value in torch.cat(list(loader)).tolist()])
        after.append(round(torch.rand(1).item(), 3))
    return rows, after


if __name__ == "__main__":
    for generator in (None, torch.Generator()):
        ended, after_ended = epochs(generator)
        persistent, after_persistent = epochs(generator, persistent_workers=True)
        print("workers that end", ended, after_ended, "persistent", persistent, after_persistent)
        assert ended[0] == ended[1] == ended[2] == persistent[0]
        assert len({tuple(rows) for rows in persistent}) == 3
        if generator is None:
            assert len(set(after_ended)) == 1 and len(set(after_persistent)) == 2
PY
"$folder/venv/bin/python" -W ignore "$folder/read.py"
