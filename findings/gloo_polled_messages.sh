#!/usr/bin/env bash
# torch 2.13.0, gloo: a send or a receive that is over does not say so: is_completed() stays False until wait().
#
# A loop that looks whether a message has come, and computes meanwhile, so looks for ever. The data are there: the
# receiver's tensor has its values. The same question about an all_reduce is answered as expected.
#
# Seen: receive: data here True, is_completed() False, after wait() True
#       send: is_completed() False, after wait() True
#       all_reduce: is_completed() True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/poll.py" <<'PY'
import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    message = torch.full((4,), 3.0 if rank == 0 else 0.0)
    under_way = dist.isend(message, 1) if rank == 0 else dist.irecv(message, 0)
    time.sleep(2)
    here, before = message.tolist() == [3.0] * 4, under_way.is_completed()
    under_way.wait()
    after = under_way.is_completed()
    if rank == 1:
        print(f"receive: data here {here}, is_completed() {before}, after wait() {after}", flush=True)
    dist.barrier()
    if rank == 0:
        print(f"send: is_completed() {before}, after wait() {after}", flush=True)
    assert here and not before and after
    total = torch.ones(4)
    summing = dist.all_reduce(total, async_op=True)
    time.sleep(2)
    if rank == 0:
        print("all_reduce: is_completed()", summing.is_completed())
    assert summing.is_completed()
    summing.wait()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" "$folder/poll.py"
