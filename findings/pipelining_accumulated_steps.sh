#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.pipelining: of several schedule steps before an update, the first ones count less and less.
#
# A schedule runs n microbatches and then divides by n, so that a mean loss gives the whole batch's gradient. One expects each
# loss, or what this step has added, to be divided. It divides p.grad, with all that was in it: gradients accumulated
# over two steps without zero_grad() are g1 / n + g2. It does so once for each stage, so that a weight which two
# stages of a process share (embedding and head, at the two ends of a V) is divided by n twice. The losses are right; Adam
# hides a constant factor, but not that the batches have other weights. With scale_grads=False and a loss_fn that divides
# by n, all is right.
#
# Seen, 4 microbatches, two equal steps, gradient over that of one step: 1.25, with scale_grads=False 2.0 (expected 2.0); a
# weight in the first and the last stage, one step, norm over the right one: 0.28, with scale_grads=False 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
MICROBATCHES = 4
mean = nn.functional.mse_loss
x, y = torch.randn(8, 4), torch.randn(8, 4)
tied = nn.Linear(4, 4)
apart = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
together = nn.ModuleList([tied, nn.Linear(4, 4), tied])


def ratio(model, steps, **options):
    """Return the norm of the first weight's gradient after `steps` equal schedule steps over that of one plain step."""
    plain, model = copy.deepcopy(model), copy.deepcopy(model)
    h = x
    for part in plain:
        h = part(h)
    mean(h, y).backward()
    device = torch.device("cpu")
    stages = [PipelineStage(part, k, len(model), device) for k, part in enumerate(model)]
    schedule = ScheduleInterleaved1F1B(stages, MICROBATCHES, **options)
    for _ in range(steps):
        schedule.step(x, target=y)
    return round((model[0].weight.grad.norm() / plain[0].weight.grad.norm()).item(), 3)


def share(output, target):
    return mean(output, target) / MICROBATCHES


for name, model, steps, wrong, right in (("two steps", apart, 2, 1.25, 2.0), ("tied", together, 1, 0.3, 1.0)):
    divided = ratio(model, steps, loss_fn=mean)
    own = ratio(model, steps, loss_fn=share, scale_grads=False)
    print(f"{name}: {divided}, with scale_grads=False {own} (expected {right})")
    assert abs(divided - wrong) < 0.1 and own == right
PY
