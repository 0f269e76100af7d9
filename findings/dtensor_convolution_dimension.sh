#!/usr/bin/env bash
# torch 2.13.0, DTensor: a convolution along a sharded dimension gives each process its own piece, and calls it the whole.
#
# DTensor pools, interpolates and normalises over a sharded dimension as if it were not sharded, by fetching what lies elsewhere,
# and refuses what it has no rule for. A convolution of a tensor that is sharded along its length, height or width it runs on
# the piece that lies here, without the neighbours' rows and with padding at the inner edges, and gives back a DTensor that is
# said to be replicated: half as long, with other values on each process. full_tensor() trusts that and returns the piece. A
# stride, groups and transposed convolutions are the same; the backward raises, so it is evaluation that is wrong. Shards of the
# batch are right.
#
# Seen, 8 numbers on two processes, kernel 3: padding 1, the whole 8 results; DTensor 4 on each, "Replicate", different; without padding
# 2 of 6; transposed 6 of 10; max_pool1d 6 of 6, right; a sharded batch right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/convolution.py" <<'PY'
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

rank = int(sys.argv[1])
store = dist.FileStore(os.path.join(sys.argv[2], "store"), 2)
dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
mesh = init_device_mesh("cpu", (2,))
x = torch.arange(1.0, 17.0).reshape(2, 1, 8)
weight = torch.tensor([[[1.0, 2.0, 3.0]]])

cases = {
    "padding 1": (lambda x, w: F.conv1d(x, w, padding=1), 2, 4),
    "no padding": (F.conv1d, 2, 2),
    "transposed": (F.conv_transpose1d, 2, 6),
    "max_pool1d": (lambda x, w: F.max_pool1d(x, 3, stride=1), 2, None),
    "padding 1, the batch sharded": (lambda x, w: F.conv1d(x, w, padding=1), 0, None),
}
for name, (run, dimension, length) in cases.items():
    right = run(x, weight)
    result = run(distribute_tensor(x, mesh, [Shard(dimension)]), distribute_tensor(weight, mesh, [Replicate()]))
    assert isinstance(result, DTensor)
    whole = result.full_tensor()
    both = [None, None]
    dist.all_gather_object(both, whole.tolist())
    if rank == 0:
        same = "the same" if both[0] == both[1] else "different"
        print(f"{name}: {whole.shape[-1]} of {right.shape[-1]} results, {result.placements}, {same} on both processes")
        if length:
            assert whole.shape[-1] == length and result.placements == (Replicate(),) and both[0] != both[1]
        else:
            assert torch.equal(whole, right) and both[0] == both[1]
dist.barrier()
dist.destroy_process_group()
PY
export GLOO_SOCKET_IFNAME=lo
"$folder/venv/bin/python" -W ignore "$folder/convolution.py" 1 "$folder" &
other=$!
"$folder/venv/bin/python" -W ignore "$folder/convolution.py" 0 "$folder"
wait "$other"
