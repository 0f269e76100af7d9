#!/usr/bin/env bash
# torchmetrics 1.9.0 with torch 2.13.0: two metrics of a MetricCollection that agree on the first batch are one metric for ever.
#
# A collection shares the state of metrics that differ only in what they make of it (precision and recall of the same counts), and
# finds them by itself. One takes that to be decided by their classes and arguments. It is decided by numbers: whose states are
# close after the very first update share one from then on, and only the first of them is updated. So metrics that count otherwise
# (another threshold, an ignore_index, another top_k) are merged if the first batch does not tell them apart, and the second
# reports the first one's value. reset() keeps the groups: one easy batch, such as the trial batch before a training,
# decides for all evaluations after it. With compute_groups=False, and with another first batch, the values are right.
#
# Seen, 6 rows after one easy batch and reset(): accuracy 0.167, without class 0 0.167 (right: 0.500, which comes with
# compute_groups=False or without the easy batch); thresholds 0.5 and 0.9, two batches: 0.625 both (right: 0.625 and 0.875)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy


def values(collection):
    return {name: round(value.item(), 3) for name, value in collection.compute().items()}


def multiclass(easy_first, **options):
    """Return the accuracies of 6 rows, 4 of them of class 0 and all of those wrong."""
    settings = {"num_classes": 4, "average": "micro"}
    collection = MetricCollection(
        {"all": MulticlassAccuracy(**settings), "without class 0": MulticlassAccuracy(**settings, ignore_index=0)}, **options
    )
    if easy_first:
        collection.update(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]))
        collection.reset()
    collection.update(torch.tensor([1, 1, 1, 1, 3, 3]), torch.tensor([0, 0, 0, 0, 2, 3]))
    return values(collection)


def thresholds(**options):
    collection = MetricCollection({"loose": BinaryAccuracy(threshold=0.5), "strict": BinaryAccuracy(threshold=0.9)}, **options)
    collection.update(torch.tensor([0.05, 0.95, 0.99, 0.01]), torch.tensor([0, 1, 1, 0]))
    collection.update(torch.tensor([0.60, 0.70, 0.80, 0.55]), torch.tensor([0, 0, 0, 1]))
    return values(collection)


right = {"all": 0.167, "without class 0": 0.5}
merged, alone, apart = multiclass(True), multiclass(False), multiclass(True, compute_groups=False)
print(f"after an easy batch and reset(): {merged}; without it {alone}; compute_groups=False {apart}")
assert merged == {"all": 0.167, "without class 0": 0.167} and alone == apart == right
merged, apart = thresholds(), thresholds(compute_groups=False)
print(f"thresholds: {merged}; compute_groups=False {apart}")
assert merged == {"loose": 0.625, "strict": 0.625} and apart == {"loose": 0.625, "strict": 0.875}
PY
