#!/usr/bin/env bash
# torch 2.13.0, FSDP2 on CPUs: a weight that is initialised after it was sharded is the same piece n times.
#
# The documented way for a model that fits no process: build it on "meta", fully_shard, to_empty, reset_parameters. On a
# GPU a DTensor's random operators move the generator on by the other processes' parts. On a CPU mesh nothing does: with
# the same seed everywhere, as it has to be, each process draws the same numbers for its rows, so that a square weight has
# the rank of one shard, and every unit comes in n copies. init.normal_ of sharded weights and dropout of sharded rows do
# it too. One warning says that random operators "may not have complete support on cpu device mesh".
#
# Seen, two processes, an 8 x 8 weight: plain initialisation: halves equal False, rank 8; sharded first: halves equal True,
# rank 4; dropout of 8 rows: halves equal True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/shards.py" <<'PY'
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def look(name, full, equal):
        found = torch.equal(full[:4], full[4:])
        if rank == 0:
            print(f"{name}: halves equal {found}, rank {torch.linalg.matrix_rank(full)}", flush=True)
        assert found == equal, name

    torch.manual_seed(0)
    look("plain", nn.Linear(8, 8).weight.detach(), False)

    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    fully_shard(model)
    model.to_empty(device="cpu")
    for layer in (model[0], model[2]):
        layer.reset_parameters()
    look("sharded first", model[0].weight.full_tensor().detach(), True)

    torch.manual_seed(0)
    dropped = nn.functional.dropout(distribute_tensor(torch.ones(8, 8), init_device_mesh("cpu", (2,)), [Shard(0)]))
    look("dropout of rows", dropped.full_tensor(), True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/shards.py" 2>/dev/null
