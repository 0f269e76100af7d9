#!/usr/bin/env bash
# torch 2.13.0: under DistributedDataParallel, of two forwards and then two backwards only the first backward is reduced.
#
# a = model(x); b = model(y); a.sum().backward(); b.sum().backward(): two losses that are looked at before either is sent back, two
# microbatches in flight, a generator's and a critic's pass. Without DDP the order does not matter, and after backward() gradients are
# taken to be means over the processes. DDP gets ready for a reduction in forward(), once for all forwards that follow each
# other; the first backward uses it up. What the second one adds is this process's own, p.grad is another one everywhere, and the
# replicas drift apart. No error and no warning, with find_unused_parameters=True neither. One backward of the sum is right, and so
# are forwards and backwards in turn.
#
# Seen, processes with inputs of 1 and of 2, gradient on each (right: 3, 3): two forwards, two backwards 2.5, 3.5; one backward of the
# sum 3, 3; in turn 3, 3; weights after three steps of SGD: apart by 0.3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/twice.py" <<'PY'
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

rank = int(sys.argv[1])
store = dist.FileStore(os.path.join(sys.argv[2], "store"), 2)
dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
x = torch.full((1, 2), rank + 1.0)


def make(**settings):
    torch.manual_seed(0)
    return DistributedDataParallel(nn.Linear(2, 1, bias=False), **settings)


def both(model):
    first, second = model(x).sum(), model(x).sum()
    first.backward()
    second.backward()


def summed(model):
    (model(x).sum() + model(x).sum()).backward()


def in_turn(model):
    model(x).sum().backward()
    model(x).sum().backward()


def everywhere(value):
    values = [None, None]
    dist.all_gather_object(values, value)
    return values


seen = {}
for name, way, settings in (
    ("both", both, {}),
    ("both, unused parameters looked for", both, {"find_unused_parameters": True}),
    ("one backward of the sum", summed, {}),
    ("in turn", in_turn, {}),
):
    model = make(**settings)
    way(model)
    seen[name] = everywhere(model.module.weight.grad[0, 0].item())
model = make()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    both(model)
    optimizer.step()
weights = everywhere(model.module.weight[0, 0].item())
if rank == 0:
    for name, values in seen.items():
        print(f"{name}: gradients {values[0]:.1f}, {values[1]:.1f}")
    print(f"weights after three steps apart by {abs(weights[0] - weights[1]):.2f}")
    assert seen["both"] == seen["both, unused parameters looked for"] == [2.5, 3.5]
    assert seen["one backward of the sum"] == seen["in turn"] == [3, 3]
    assert abs(abs(weights[0] - weights[1]) - 0.3) < 1e-4
dist.barrier()
dist.destroy_process_group()
PY
export GLOO_SOCKET_IFNAME=lo
"$folder/venv/bin/python" -W ignore "$folder/twice.py" 1 "$folder" &
other=$!
"$folder/venv/bin/python" -W ignore "$folder/twice.py" 0 "$folder"
wait "$other"
