#!/usr/bin/env bash
# torch 2.13.0, gloo: a send of four bytes is not over until the other process has asked for it.
#
# Small messages usually leave for a buffer at once (a socket's, MPI's eager protocol), so that a sender goes on and a
# receiver that asks late finds them there. gloo moves nothing before both ends have asked, whatever the size: the
# sender waits for the receiver, and a receiver that asks when it needs the message waits for all of its way. Only a
# receive that was posted before has it at hand.
#
# Seen: 4 bytes: the send took 1.00 s of the receiver's 1 s pause
#       40000 bytes: the send took 1.00 s of the receiver's 1 s pause
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/send.py" <<'PY'
import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PAUSE_S = 1.0


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for count in (1, 10_000):
        message = torch.ones(count)
        dist.barrier()
        if rank == 0:
            begin = time.perf_counter()
            dist.isend(message, 1).wait()
            took = time.perf_counter() - begin
            print(f"{4 * count} bytes: the send took {took:.2f} s of the receiver's {PAUSE_S:g} s pause")
            assert took > 0.8 * PAUSE_S
        else:
            time.sleep(PAUSE_S)
            dist.recv(message, 0)
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" "$folder/send.py"
