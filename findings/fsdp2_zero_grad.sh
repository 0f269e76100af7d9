#!/usr/bin/env bash
# torch 2.13.0, FSDP2: zero_grad() leaves the gradients of backwards without synchronisation, which the next one adds.
#
# With set_requires_gradient_sync(False) a backward adds up whole gradients inside FSDP, out of sight: every p.grad is None.
# So zero_grad() of the module or the optimizer finds nothing, and the first backward that synchronises brings them in. A
# loop that drops a microbatch, or the incomplete last steps of an epoch, trains on what it dropped, an epoch later too.
# The same loop without FSDP, or with each backward synchronised, drops it.
#
# Seen (gradient after: backward, zero_grad(), the same backward again; in gradients of one backward): plain 1.0; FSDP2 each
# synchronised 1.0; the first without synchronisation 2.0, p.grad None before zero_grad()
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/drop.py" <<'PY'
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x = torch.ones(4, 2)
    for name, sharded, first_synchronised in (
        ("plain", False, True),
        ("FSDP2, synchronised", True, True),
        ("FSDP2, the first not", True, False),
    ):
        torch.manual_seed(0)
        model = nn.Linear(2, 2, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if sharded:
            fully_shard(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model.set_requires_gradient_sync(first_synchronised)
        model(x).sum().backward()  # of a microbatch that is dropped
        hidden = model.weight.grad is None
        optimizer.zero_grad()
        model.zero_grad()
        if sharded:
            model.set_requires_gradient_sync(True)
        model(x).sum().backward()
        gradient = model.weight.grad.full_tensor() if sharded else model.weight.grad
        if rank == 0:
            print(f"{name:22} p.grad None after the first: {hidden}; gradients in the second: {gradient[0, 0] / 4}")
        assert hidden != first_synchronised and gradient[0, 0] / 4 == (1 if first_synchronised else 2), name
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/drop.py" 2>/dev/null
