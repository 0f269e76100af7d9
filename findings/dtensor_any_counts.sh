#!/usr/bin/env bash
# torch 2.13.0, DTensor: any() over a sharded dimension, taken as a number, is the number of processes that have one.
#
# any(0).float() is 1 for a column that has one: which experts got a token, which units are alive, whether a batch has a label at
# all. Over sharded rows the result is partial, and waits to be added up. For booleans that is right, and full_tensor(), `~`, `&`
# and where() see to it. But float(), int() and any other cast, sum() and a factor let it go on waiting: the boolean becomes a
# number first, and the numbers are then added. So a column that two processes have counts 2, and a mean over four columns of
# which one has none is 1. all() is right, and so is (x > 0).int().amax(0).
#
# Seen, two processes, columns that both, the first, the second and none have, right and what comes out: any(0) itself right;
# float() 1 1 1 0, 2 1 1 0; times 2.0 2 2 2 0, 4 2 2 0; sum 3, 4; mean 0.75, 1.0; all columns together 1, 2; amax right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/any.py" <<'PY'
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

FORMS = {
    "any(0)": (lambda hit: hit.any(0), True),
    "any(0), where": (lambda hit: torch.where(hit.any(0), 1.0, 0.0), True),
    "none, float": (lambda hit: (~hit.any(0)).float(), True),
    "all(0), float": (lambda hit: hit.all(0).float(), True),
    "amax(0) of int, float": (lambda hit: hit.int().amax(0).float(), True),
    "any(0), float": (lambda hit: hit.any(0).float(), False),
    "any(0), long": (lambda hit: hit.any(0).long(), False),
    "any(0) times 2.0": (lambda hit: hit.any(0) * 2.0, False),
    "any(0), sum": (lambda hit: hit.any(0).sum(), False),
    "any(0), mean": (lambda hit: hit.any(0).float().mean(), False),
    "any(), int": (lambda hit: hit.any().int(), False),
}


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    plain = torch.tensor([[True, True, False, False], [False] * 4, [True, False, True, False], [False] * 4])
    sharded = distribute_tensor(plain, init_device_mesh("cpu", (2,)), [Shard(0)])
    for name, (form, expected) in FORMS.items():
        right, out = form(plain), form(sharded).full_tensor()
        same = torch.equal(right, out)
        if rank == 0:
            print(f"{name}: {right.tolist()}, sharded {out.tolist()}", flush=True)
        assert same is expected, name
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/any.py"
