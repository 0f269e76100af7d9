#!/usr/bin/env bash
# torch 2.13.0, gloo: all_reduce, broadcast, reduce and scatter of a tensor with gaps take the memory without gaps.
#
# A column of a matrix is a valid tensor whose elements are a row apart. These four take its address and its number of
# elements: they send and overwrite what lies there, the first row. The column itself gets its first element right. Nothing
# raises. all_gather and reduce_scatter of the same column are right, to the same column too, and so are the functional
# collectives; recv() raises ("has to be contiguous"). So a loop over slices of a buffer (one column of statistics a process,
# a head's gradients, every second row) works with some collectives, and with others mixes up its neighbours.
#
# Seen, two processes with 4 x 4 matrices of ones and twos, column 0: all_reduce gives row 0 = 3 3 3 3 and leaves 1 in the
# rest of the column; broadcast from process 1 row 0 = 2 2 2 2; scatter of the columns of 0 to 15: 0 1 2 3 instead of 0 4 8 12
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/column.py" <<'PY'
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def after(rank, call):
    """Return a matrix of this process's own value after a collective on its column 0."""
    matrix = torch.full((4, 4), rank + 1.0)
    call(matrix[:, 0])
    return matrix.tolist()


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    added = after(rank, dist.all_reduce)
    sent = after(rank, lambda column: dist.broadcast(column, 1))
    reduced = after(rank, lambda column: dist.reduce(column, 0))
    numbers = torch.arange(16.0).view(4, 4)
    part, gathered = torch.zeros(4), [torch.zeros(4), torch.zeros(4)]
    dist.scatter(part, [numbers[:, 0], numbers[:, 1]] if rank == 0 else None, 0)
    dist.all_gather(gathered, numbers[:, 0])
    if rank == 0:
        print("all_reduce", added, "broadcast", sent, "reduce", reduced, "scatter", part.tolist(), flush=True)
        ones = [[1.0] * 4] * 3
        assert added == reduced == [[3.0] * 4, *ones] and sent == [[2.0] * 4, *ones]
        assert part.tolist() == [0.0, 1.0, 2.0, 3.0] and gathered[1].tolist() == [0.0, 4.0, 8.0, 12.0]
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" "$folder/column.py"
