#!/usr/bin/env bash
# torch 2.13.0: ZeroRedundancyOptimizer trains nothing where a group's parameters are given as model.parameters().
#
# {"params": model.base.parameters(), "lr": 1e-2} is how torch's documentation writes a group: parameters() is a generator, and
# every optimizer makes a list of it. ZeroRedundancyOptimizer goes through the groups once to check them and once more to take
# them, and the second time the generators are at their end. Its groups have no parameters. A single generator for all
# parameters is right, and so are groups of lists. step() does nothing, and zero_grad() does nothing either, so that gradients
# add up meanwhile. The groups keep their learning rates, and there is no warning.
#
# Seen, SGD over two layers' groups, one step: plain optimizer 2 and 2 parameters, all of 4 moved; ZeroRedundancyOptimizer 0 and
# 0 parameters, none moved; with lists, and with one generator, all moved
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/groups.py" <<'PY'
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

FORMS = {
    "generators": lambda model: [{"params": layer.parameters(), "lr": 0.1} for layer in model],
    "lists": lambda model: [{"params": list(layer.parameters()), "lr": 0.1} for layer in model],
    "one generator": lambda model: model.parameters(),
}


def moved(form, make):
    """Return how many parameters the groups have, and how many of the model's 4 a step has moved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = make(FORMS[form](model))
    model(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert (model[0].weight.grad is None) == (len(optimizer.param_groups[0]["params"]) > 0)
    changed = sum(not torch.equal(old, new) for old, new in zip(before, model.parameters()))
    return [len(group["params"]) for group in optimizer.param_groups], changed


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}
    for form in FORMS:
        found[form] = moved(form, lambda groups: torch.optim.SGD(groups, lr=0.1))
        found[form] += moved(form, lambda groups: ZeroRedundancyOptimizer(groups, torch.optim.SGD, lr=0.1))
        if rank == 0:
            print(form, "(groups, moved) plain, ZeRO:", found[form], flush=True)
    assert found["generators"] == ([2, 2], 4, [0, 0], 0)
    assert found["lists"] == ([2, 2], 4, [2, 2], 4) and found["one generator"] == ([4], 4, [4], 4)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/groups.py"
