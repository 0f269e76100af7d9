#!/usr/bin/env bash
# torch 2.13.0, gloo: recv() of a message that is shorter than its tensor, or of another dtype, raises nothing.
#
# The rest of the tensor keeps what was in it, and the bytes are taken as the receiver's type.
# So a pipeline whose last microbatch is shorter computes on rows of the one before, and says nothing.
#
# Seen: two numbers into four: [1.0, 1.0, 7.0, 7.0]; two floats as one int64: [4611686019492741120]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/receive.py" <<'PY'
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def work(rank, port):
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    if rank == 0:
        dist.send(torch.ones(2), 1)
        dist.send(torch.tensor([1.0, 2.0]), 1)
    else:
        four, whole = torch.full((4,), 7.0), torch.zeros(1, dtype=torch.int64)
        dist.recv(four, 0)
        dist.recv(whole, 0)
        print(f"two numbers into four: {four.tolist()}; two floats as one int64: {whole.tolist()}")
        assert four.tolist() == [1.0, 1.0, 7.0, 7.0]
        assert whole.tolist() == [4611686019492741120]
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/receive.py" 2>/dev/null
