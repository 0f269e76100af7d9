#!/usr/bin/env bash
# torch 2.13.0, gloo: reduce() to one process leaves partial sums in the others' tensors, others in each part of a tensor.
#
# "Only the process with rank dst is going to receive the final result", says the documentation, so one expects the others to
# keep what they gave. gloo adds in place wherever its algorithm passes: the first elements of a tensor may hold the process's
# own value and the last ones the sum of two processes of three. A counter that is reduced for a log and goes on counting
# (tokens, losses, statistics) counts a part of the others' again at the next log, and what is logged is wrong although each
# reduce is right. Nothing raises. A reduce of a clone is safe.
#
# Seen, three processes with 1, 10 and 100 four times: to process 0: process 0 has 111 111 111 111, 1 has 110 110 111 111, 2 has
# 100 100 101 101; a counter that each raises by one a step, reduced after each of 3 steps to a copy on process 0: 3 3 3 3, 7 7
# 9 9, 12 12 19 19 instead of 3, 6 and 9
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
    tensor = torch.full((4,), 10.0**rank)
    dist.reduce(tensor, 0)
    everyone = [torch.zeros(4) for _ in range(3)]
    dist.all_gather(everyone, tensor)

    logged, counter = [], torch.zeros(4)
    for _ in range(3):
        counter += 1
        result = counter.clone() if rank == 0 else counter
        dist.reduce(result, 0)
        logged.append(result.tolist())
    if rank == 0:
        print("to process 0 of 1, 10 and 100:", [t.tolist() for t in everyone])
        print("logged (3, 6, 9 wanted):", logged, flush=True)
        assert everyone[0].tolist() == [111.0] * 4 and logged[0] == [3.0] * 4 and logged[2] != [9.0] * 4
        assert any(set(t.tolist()) != {10.0**k} for k, t in enumerate(everyone) if k)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=3)
PY
"$folder/venv/bin/python" "$folder/reduce.py"
