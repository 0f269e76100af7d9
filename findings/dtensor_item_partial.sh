#!/usr/bin/env bash
# torch 2.13.0, DTensor: item(), float() and `if` of a sum over shards take this process's part of it.
#
# x.sum() of a sharded DTensor is a DTensor whose parts have not been added yet. Whatever is computed with it further, printed by
# full_tensor() or used in a backward is right, because DTensor adds the parts first. item() does not: it returns the number
# that lies here, another one on each process, and so do float(), int(), bool() and `if`. That is how one logs a loss and asks
# whether a tensor has a NaN: processes take different branches, which hangs in the next collective at best. full_tensor().item()
# is right, and so is item() of the norm that clip_grad_norm_ returns under FSDP2, whose parts are added inside.
#
# Seen, 1 2 3 4 on two processes, item() on each: sum 3, 7 (right: 10); norm 2.236, 5.0 (5.477); amax 2, 4 (4); (x > 3).any()
# False, True (True); FSDP2's gradient norm 2.828, 2.828 (2.828); with full_tensor() all right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/item.py" <<'PY'
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

rank = int(sys.argv[1])
store = dist.FileStore(os.path.join(sys.argv[2], "store"), 2)
dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
mesh = init_device_mesh("cpu", (2,))
x = distribute_tensor(torch.tensor([1.0, 2.0, 3.0, 4.0]), mesh, [Shard(0)])

torch.manual_seed(0)
model = nn.Linear(4, 2, bias=False)
fully_shard(model, mesh=mesh)
model(torch.ones(1, 4)).sum().backward()  # a gradient of ones, 2 x 4
norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)

values = {"sum": x.sum(), "norm": x.norm(), "amax": x.amax(), "any": (x > 3).any(), "gradient's norm": norm}
here = [float(value.item()) for value in values.values()]
branch = float(bool((x > 3).any()))
whole = [float(value.full_tensor().item()) for value in values.values()]
parts = [None, None]
dist.all_gather_object(parts, [*here, branch])
if rank == 0:
    for name, first, second, right in zip(values, *parts, whole):
        print(f"{name}: item() {first:.3f}, {second:.3f}; full_tensor().item() {right:.3f}")
    print(f"bool of any: {parts[0][-1]:.0f}, {parts[1][-1]:.0f}")
    assert parts[0][0] == 3 and parts[1][0] == 7 and whole[0] == 10
    assert parts[0][2] == 2 and parts[1][2] == 4 and whole[2] == 4
    assert (parts[0][3], parts[1][3], whole[3]) == (0, 1, 1) and (parts[0][-1], parts[1][-1]) == (0, 1)
    assert all(abs(part[4] - 8**0.5) < 1e-3 for part in parts)
dist.barrier()
dist.destroy_process_group()
PY
export GLOO_SOCKET_IFNAME=lo
"$folder/venv/bin/python" -W ignore "$folder/item.py" 1 "$folder" &
other=$!
"$folder/venv/bin/python" -W ignore "$folder/item.py" 0 "$folder"
wait "$other"
