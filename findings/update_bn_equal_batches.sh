#!/usr/bin/env bash
# torch 2.13.0: update_bn counts a last batch of 4 rows as much as one of 64, and loses how far batches lie apart.
#
# torch.optim.swa_utils.update_bn(loader, model) gives averaged weights the statistics of a pass over the data, and one expects
# those of all rows. It takes the average of the batches' means and the average of the batches' variances. A short last batch,
# which a loader keeps by default, counts as a whole one. And the variance of all rows is that within the batches and that
# between them; the second is left out, so over a loader that does not shuffle, with rows ordered by class, length or file, the
# variance is too small by any factor, and evaluation divides by its root. Shuffled and even batches are nearly right, and
# nothing tells the difference.
#
# Seen, mean and variance, right and by update_bn: 64 rows near 0 and then 4 near 10 in batches of 64: 0.7 and 7.4, 5.4 and 0.9;
# 64 rows near 0 and 64 near 10 in order: 5.1 and 25.9, 5.1 and 1.1; the same shuffled: 5.1 and 25.9, 5.1 and 26.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader


def statistics(loader):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
    update_bn(loader, model)
    return model[0].running_mean.item(), model[0].running_var.item()


torch.manual_seed(0)
near, far = torch.randn(64, 1), torch.randn(64, 1) + 10
short, ordered = torch.cat([near, far[:4]]), torch.cat([near, far])
found = {}
for name, rows, shuffle in (("short last", short, False), ("ordered", ordered, False), ("shuffled", ordered, True)):
    right = rows.mean().item(), rows.var().item()
    found[name] = statistics(DataLoader(rows, batch_size=64, shuffle=shuffle))
    print(f"{name}: right {right[0]:.2f}, {right[1]:.1f}; update_bn {found[name][0]:.2f}, {found[name][1]:.1f}")
assert found["short last"][0] > 4 and short.mean() < 1
assert found["ordered"][1] < 2 and found["shuffled"][1] > 20 and ordered.var() > 20
PY
