#!/usr/bin/env bash
# torch 2.13.0, DTensor: the gradient of amax, amin or an infinity norm over a sharded dimension is NaN, or infinite.
#
# The gradient of a maximum goes to the elements that equal it, shared among them. How many they are is not summed over the
# processes: what they divide by is the number on process 0. If the largest element lies on another one, that is 0: the gradient
# is infinite there and NaN everywhere else, on all processes. If it lies on several, each gets the whole gradient. The value
# is right, and so are sums, 2-norms and the same line on a plain tensor. So a sharded weight that is divided by its
# largest element (x / x.abs().amax(): fake quantisation, normalised weights) trains, or turns into NaN, depending on
# where that element happens to lie.
#
# Seen, two processes with two elements each, gradient of amax plain and sharded: of 4 3 2 1: 1 0 0 0, 1 0 0 0; of 1 2 3 4:
# 0 0 0 1, nan nan nan inf; of 4 1 4 1: 0.5 0 0.5 0, 1 0 1 0. The infinity norm is as amax, the 2-norm right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/largest.py" <<'PY'
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

CASES = (
    ([4.0, 3.0, 2.0, 1.0], [1.0, 0.0, 0.0, 0.0]),
    ([1.0, 2.0, 3.0, 4.0], [torch.nan, torch.nan, torch.nan, torch.inf]),
    ([4.0, 1.0, 4.0, 1.0], [1.0, 0.0, 1.0, 0.0]),
)
NORMS = {"amax": torch.amax, "infinity norm": lambda x: torch.linalg.vector_norm(x, torch.inf)}


def gradients(reduction, values, mesh):
    """Return the gradient of a plain tensor and of a sharded one, whole."""
    plain = torch.tensor(values, requires_grad=True)
    sharded = distribute_tensor(torch.tensor(values), mesh, [Shard(0)]).requires_grad_()
    results = reduction(plain), reduction(sharded).full_tensor()
    assert torch.equal(*results)
    for result in results:
        result.backward()
    return plain.grad, sharded.grad.full_tensor()


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for values, seen in CASES:
        for name, reduction in NORMS.items():
            plain, sharded = gradients(reduction, values, mesh)
            if rank == 0:
                print(f"{name} of {values}: plain {plain.tolist()}, sharded {sharded.tolist()}", flush=True)
            assert torch.allclose(sharded, torch.tensor(seen), equal_nan=True)
        plain, sharded = gradients(torch.linalg.vector_norm, values, mesh)
        assert torch.allclose(plain, sharded)


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/largest.py"
