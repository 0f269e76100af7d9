#!/usr/bin/env bash
# torch 2.13.0, DTensor: a sum of norms over shards is too small, and a loss that is a function of it has a wrong gradient.
#
# x.norm(dim=0).sum(), the norms of columns added up, is a penalty of groups; torch.stack of the norms of some gradients,
# summed, is what one logs. Of a tensor whose rows are sharded the norms are partial: each process has those of its own rows,
# and the root of the sum of squares is still to be taken. sum() takes partial norms for partial sums: it adds this process's
# parts, keeps the placement, and the root of squares is taken of these sums at last. By Minkowski's inequality that is less, up
# to the root of the number of processes. The plain penalty's gradient is right, that of its square or logarithm is not. mean()
# of the same norms is right, and so are `a + b`, a sum in Python, 1-norms, and norms of sharded columns.
#
# Seen, a 4 x 4 identity on two processes, right value and what comes out: sum of the columns' norms 4, 2.83; of a stack of two
# norms 2, 1.41; its square 16, 8 with gradients 8, 5.66; means 1, 1; `a + b` 2, 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/norms.py" <<'PY'
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def stacked(x):
    return torch.stack([x[:, 0].norm(), x[:, 3].norm()])


CASES = {  # what is computed of the weights, its value, value of DTensor, factor of the gradient
    "sum": (lambda x: x.norm(dim=0).sum(), 4.0, 8**0.5, 1.0),
    "sum of a stack": (lambda x: stacked(x).sum(), 2.0, 2**0.5, 1.0),
    "its square": (lambda x: x.norm(dim=0).sum() ** 2, 16.0, 8.0, 0.5**0.5),
    "mean": (lambda x: x.norm(dim=0).mean(), 1.0, 1.0, 1.0),
    "mean of a stack": (lambda x: stacked(x).mean(), 1.0, 1.0, 1.0),
    "a + b": (lambda x: x[:, 0].norm() + x[:, 3].norm(), 2.0, 2.0, 1.0),
    "sum of 1-norms": (lambda x: x.norm(p=1, dim=0).sum(), 4.0, 4.0, 1.0),
}


def taken(function, x):
    """Return the value, and the gradient's first element."""
    x.requires_grad_()
    value = function(x)
    value.backward()
    value, grad = (t.full_tensor() if isinstance(t, DTensor) else t for t in (value, x.grad))
    return value.item(), grad[0, 0].item()


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name, (function, plain, sharded, factor) in CASES.items():
        right = taken(function, torch.eye(4))
        found = taken(function, distribute_tensor(torch.eye(4), mesh, [Shard(0)]))
        if rank == 0:
            print(f"{name}: {right[0]:.3g}, DTensor {found[0]:.3g}; gradient {right[1]:.3g}, {found[1]:.3g}", flush=True)
        assert abs(right[0] - plain) < 1e-5 and abs(found[0] - sharded) < 1e-5
        assert abs(found[1] - factor * right[1]) < 1e-5
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/norms.py" 2>/dev/null
