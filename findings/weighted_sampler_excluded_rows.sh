#!/usr/bin/env bash
# torch 2.13.0: WeightedRandomSampler without replacement draws rows of weight 0 once the others are used up.
#
# A weight of 0 takes a row out: one that is held out, broken, or not yet due in a curriculum. With replacement=False each of
# the others comes once, and with num_samples=len(weights), the number that one has at hand, one expects the sampler to end
# after them, or torch.multinomial to raise, whose documentation says that there "must" be enough elements that are not 0. It
# raises for more samples than elements, and for weights that are all 0; in between it fills up with rows of weight 0, each
# once, so that an epoch has every row. Nothing says so. With replacement rows of weight 0 never come.
#
# Seen, 6 of 10 weights are 0: 4 samples: 0 of them have weight 0; 10 samples: 6; with replacement, 10,000 samples: 0; 11
# samples and weights of 0 alone: RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from torch.utils.data import WeightedRandomSampler

torch.manual_seed(0)
weights = [0.0, 1.0, 0.0, 2.0, 0.0, 1.0, 0.0, 3.0, 0.0, 0.0]


def excluded(samples, replacement, weights=weights):
    try:
        rows = list(WeightedRandomSampler(weights, samples, replacement))
    except RuntimeError:
        return "RuntimeError"
    assert len(rows) == samples
    return sum(weights[row] == 0 for row in rows)


cases = {
    "4 samples": (excluded(4, False), 0),
    "10 samples": (excluded(10, False), 6),
    "10,000 with replacement": (excluded(10000, True), 0),
    "11 samples": (excluded(11, False), "RuntimeError"),
    "weights of 0 alone": (excluded(2, False, [0.0] * 4), "RuntimeError"),
}
for name, (found, expected) in cases.items():
    print(f"{name}: {found}")
    assert found == expected, name
PY
