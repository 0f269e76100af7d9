#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.pipelining: before the first step each stage runs once more, later ones on memory nobody has
# written.
#
# A PipelineStage that is given no shapes finds them out in the first step: it runs the module. Not on the meta device or on
# fake tensors, as one would think, but really, in training mode: the first stage on the first microbatch, every other one on
# uninitialised memory. Whatever a forward leaves behind counts it: BatchNorm's statistics of the second stage have seen a batch
# of anything (means from 0 to 1e29 in three runs), and decay it only slowly; counters, caches and hooks see a microbatch more.
# The loss, for which BatchNorm takes the batch's own statistics, shows nothing; the evaluation does.
#
# Seen, one step of 4 microbatches on two stages: 5 forwards of each stage; BatchNorm has counted 5; the first stage's mean is
# that of the first microbatch twice and the others; the second stage's first input is none of those that it got
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/step.py" <<'PY'
import copy
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.layer, self.inputs = nn.BatchNorm1d(4), nn.Linear(4, 4), []

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        return self.layer(self.norm(x))


def work(rank, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    parts = [Part(), Part()]
    plain = copy.deepcopy(parts)
    x, y = torch.randn(8, 4) + 3, torch.randn(8, 4)
    schedule = ScheduleGPipe(PipelineStage(parts[rank], rank, 2, torch.device("cpu")), 4, loss_fn=nn.functional.mse_loss)
    if rank == 0:
        schedule.step(x)
    else:
        schedule.step(target=y)
    part = parts[rank]
    for rows in (x[:2], *x.chunk(4)) if rank == 0 else x.chunk(4):
        plain[1](plain[0](rows))
    forwards, counted = len(part.inputs), part.norm.num_batches_tracked.item()
    print(f"stage {rank}: {forwards} forwards, {counted} batches counted, mean {part.norm.running_mean.tolist()}")
    assert forwards == counted == 5
    if rank == 0:
        assert torch.equal(part.inputs[0], x[:2]) and torch.allclose(part.norm.running_mean, plain[0].norm.running_mean)
    else:
        for got, wanted in zip(part.inputs[1:], plain[1].inputs):
            assert torch.allclose(got, wanted, atol=1e-6) and not torch.allclose(part.inputs[0], wanted, atol=1e-3)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/step.py" 2>/dev/null
