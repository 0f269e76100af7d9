#!/usr/bin/env bash
# torchmetrics 1.9.0 with torch 2.13.0: R2Score of bf16 values gives a worthless model 0.9; a perplexity in fp16 is infinite.
#
# A batch of predictions as they leave a model under autocast is a valid update. Metrics keep their counts in fp32, nothing is
# said, and most are right to some parts in a thousand: mean squared error, correlation, accuracy, AUROC. R2Score and
# ExplainedVariance add up squares in the batch's dtype and subtract: where the mean of the targets is some times their spread,
# what is left is the rounding, and it looks like a variance that the model explains. Perplexity takes the logarithm of the
# softmax: a probability that fp16 does not hold is 0, and one such token makes all infinite. float() before update() helps.
#
# Seen, 20,000 targets of mean 100 and spread 1.4, predictions that know only the mean, fp64, fp32, bf16: R2Score -0.50, -0.50,
# 0.88; ExplainedVariance the same; PearsonCorrCoef 0.00, 0.00, 0.00; MeanSquaredError 3.1, 3.1, 3.1. Perplexity of logits of
# spread 4 over 1,000 tokens: fp32 1.5e6, fp16 inf; exp of fp16 cross_entropy 1.5e6
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy torchmetrics==1.9.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
import torchmetrics
from torch.nn import functional
from torchmetrics.text import Perplexity


def measured(make, predictions, targets):
    metric = make()
    metric.update(predictions, targets)
    return metric.compute().item()


draw = torch.Generator().manual_seed(0)
targets = (100 + 1.4 * torch.randn(20000, generator=draw)).bfloat16()
predictions = (100 + torch.randn(20000, generator=draw)).bfloat16()
for make, narrow_right in (
    (torchmetrics.R2Score, False),
    (torchmetrics.ExplainedVariance, False),
    (torchmetrics.PearsonCorrCoef, True),
    (torchmetrics.MeanSquaredError, True),
):
    dtypes = (torch.double, torch.float, torch.bfloat16)
    right, single, narrow = (measured(make, predictions.to(d), targets.to(d)) for d in dtypes)
    print(f"{make.__name__}: fp64 {right:.3f}, fp32 {single:.3f}, bf16 {narrow:.3f}")
    assert abs(single - right) < 0.02 and (abs(narrow - right) < 0.05) == narrow_right
    if not narrow_right:
        assert right < -0.4 and narrow > 0.7

logits = (torch.randn(2, 500, 1000, generator=draw) * 4).half()
ids = torch.randint(1000, (2, 500), generator=draw)
single, narrow = (measured(Perplexity, logits.to(d), ids) for d in (torch.float, torch.half))
entropy = functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).float().exp().item()
print(f"Perplexity: fp32 {single:.2g}, fp16 {narrow}; exp of fp16 cross_entropy {entropy:.2g}")
assert narrow == float("inf") and abs(entropy / single - 1) < 0.1
PY
