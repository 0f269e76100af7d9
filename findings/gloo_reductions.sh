#!/usr/bin/env bash
# torch 2.13.0, gloo: an all-reduce treats elements of one tensor differently, by their place in it.
#
# gloo cuts a tensor into one piece a process and adds each piece in another order, in the tensor's own type.
# MAX of 0, NaN, 2 over three processes is NaN in some places and 0 in others, the largest finite number in none;
# the fp16 SUM of 40000 + 40000 - 40000 is 40000 in some places and inf in others.
#
# Seen: MAX of three processes [0, NaN, 2]: [0.0, 0.0, nan]; of fp16 40000 + 40000 - 40000:
#       [40000.0, 40000.0, 40000.0, 40000.0, inf, inf]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/reduce.py" <<'PY'
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    most = torch.full((3,), [0.0, float("nan"), 2.0][rank])
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    total = torch.full((6,), [40000.0, 40000.0, -40000.0][rank], dtype=torch.float16)
    dist.all_reduce(total)
    if rank == 0:
        print("MAX of [0, nan, 2]:", most.tolist(), " fp16 40000 + 40000 - 40000:", total.tolist())
        assert most.isnan().any() and not most.isnan().all() and 2.0 not in most.tolist()
        assert total.isinf().any() and not total.isinf().all()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=3)
PY
"$folder/venv/bin/python" "$folder/reduce.py"
