#!/usr/bin/env bash
# torch 2.13.0, FSDP2: an optimizer that is made after an evaluation does not train the root's parameters, and says nothing.
#
# Optimizers are to be made after fully_shard, and one does so; between the two there may be a look at the first loss, or a
# trial forward for shapes, under no_grad(). The root module's own parameters (embedding, last norm, head, whatever is in no
# block) stay gathered after a forward, since a backward would need them at once. model.parameters() gives these gathered
# tensors until the next backward, and the optimizer takes them. Gradients come to the sharded parameters, which it does not
# have; its own have none and are left out. The blocks' parameters, which are sharded again after each forward, train.
# model.reshard() after the evaluation, or an optimizer made before it, is right.
#
# Seen, two processes, a head in the root and a block, 3 steps of SGD, has it moved (block, head): optimizer before the
# evaluation True, True; after it True, False; after it and reshard() True, True; parameters with a gradient in the optimizer 2,
# 1, 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/sharded.py" <<'PY'
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard

x = torch.ones(4, 2)


def trained(evaluated, early=False, reshard=False):
    """Return which of block and head have moved, and how many of the optimizer's parameters have a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    before = [layer.weight.detach().clone() for layer in model]
    fully_shard(model[0])
    fully_shard(model)
    if early:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if evaluated:
        with torch.no_grad():
            model(x)
    if reshard:
        model.reshard()
    if not early:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    moved = [not torch.equal(layer.weight.full_tensor(), old) for layer, old in zip(model, before)]
    return moved, sum(p.grad is not None for p in optimizer.param_groups[0]["params"])


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    cases = {
        "no evaluation": (trained(False), ([True, True], 2)),
        "optimizer before the evaluation": (trained(True, early=True), ([True, True], 2)),
        "optimizer after it": (trained(True), ([True, False], 1)),
        "optimizer after it and reshard()": (trained(True, reshard=True), ([True, True], 2)),
    }
    for name, (found, expected) in cases.items():
        if rank == 0:
            print(f"{name}: block and head moved {found[0]}, {found[1]} with a gradient")
        assert found == expected, name
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/sharded.py" 2>/dev/null
