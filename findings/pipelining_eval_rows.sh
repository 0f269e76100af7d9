#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.pipelining: eval() of 5 rows in 4 microbatches returns 8 rows, and keeps a graph.
#
# The batch is cut by torch.tensor_split's sizes (2, 1, 1, 1), but a stage takes the shape of its outputs from its first
# microbatch alone and what it receives has that shape: every microbatch comes back with 2 rows. eval() also leaves
# gradients on, so that the result hangs on a graph.
#
# Seen: 5 rows in, output (8, 2), requires_grad True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/evaluate.py" <<'PY'
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    parts = [nn.Linear(4, 4), nn.Linear(4, 2)]
    stage = PipelineStage(parts[rank], rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 4, loss_fn=nn.functional.mse_loss)
    x, y = torch.randn(5, 4), torch.randn(5, 2)
    out = schedule.eval(x) if rank == 0 else schedule.eval(target=y)
    if rank == 1:
        print("5 rows in, output", tuple(out.shape), "requires_grad", out.requires_grad)
        assert out.shape == (8, 2) and out.requires_grad
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/evaluate.py" 2>/dev/null
