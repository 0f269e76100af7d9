#!/usr/bin/env bash
# torch 2.13.0, FSDP2: with param_dtype=bf16, gradients that are accumulated without synchronisation are added up in bf16.
#
# MixedPrecisionPolicy(param_dtype=torch.bfloat16) keeps fp32 parameters, and p.grad is fp32: accumulated over microbatches it
# is exact to fp32. set_requires_gradient_sync(False) saves the reductions of all microbatches but the last, and one expects the
# same sum. It is kept in reduce_dtype until the reduction, which is param_dtype unless one sets it. In bf16 a sum of equal
# terms stops at 256 of them, and of unequal ones each addition rounds to 8 bits. p.grad is None meanwhile and fp32 at the end,
# so nothing shows it. The default is meant for the wire; reduce_dtype=torch.float32 makes both ways equal.
#
# Seen, two processes, 300 equal microbatches of gradient 1: each synchronised 300; only the last one synchronised 256; with
# reduce_dtype=torch.float32 300, 300; 16 microbatches of random rows, error of the sum relative to that in fp32: 0, 4e-3
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
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def accumulated(rows, synchronised, reduce_dtype):
    """Return the gradient of a weight over microbatches, from fp32 parameters."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False)
    fully_shard(layer, mp_policy=policy)
    for number, x in enumerate(rows):
        layer.set_requires_gradient_sync(synchronised or number == len(rows) - 1)
        layer(x).sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    return layer.weight.grad.full_tensor()


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for reduce_dtype, expected in ((None, [300, 256]), (torch.float32, [300, 300])):
        equal = [torch.ones(1, 4)] * 300
        found = [accumulated(equal, synchronised, reduce_dtype)[0, 0].item() for synchronised in (True, False)]
        if rank == 0:
            print(f"reduce_dtype {reduce_dtype}: each synchronised {found[0]:.0f}, the last one {found[1]:.0f}")
        assert found == expected
    rows = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(16)]
    right = accumulated(rows, True, torch.float32)
    errors = [((accumulated(rows, way, None) - right).norm() / right.norm()).item() for way in (True, False)]
    if rank == 0:
        print(f"random rows, relative error: each synchronised {errors[0]:.1g}, the last one {errors[1]:.1g}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/sharded.py" 2>/dev/null
