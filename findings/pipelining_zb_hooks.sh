#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.pipelining: under zero-bubble schedules DistributedDataParallel does not reduce gradients.
#
# A stage may be wrapped in DDP: the stage knows it, leaves out the reduction for all microbatches but the last one, and under
# 1F1B replicas agree. ScheduleInterleavedZeroBubble, ZBVZeroBubble and DualPipeV split a backward: they take weight
# gradients by torch.autograd.grad and put them into p.grad themselves. What hangs on the accumulation does not run, in all
# stages but the first: DDP's reduction, and every post-accumulate hook (an optimizer in the backward takes no step). No
# error and no warning: replicas keep gradients of their own rows, and drift apart. Hooks on the tensor do run.
#
# Seen, three stages on each of two replicas, largest difference between the replicas' gradients by stage: 1F1B 0, 0, 0; zero
# bubble 0, 0.1 to 1, 0.1 to 1. Calls of post-accumulate hooks by stage, 4 microbatches: 1F1B 4, 4, 4; zero bubble 4, 0, 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/replicas.py" <<'PY'
import copy
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble
from torch.nn.parallel import DistributedDataParallel


def step(kind, parts, group, x, y):
    stages = [PipelineStage(part, k, len(parts), torch.device("cpu"), group=group) for k, part in enumerate(parts)]
    kind(stages, 4, loss_fn=nn.functional.mse_loss).step(x, target=y)


def apart(weight):
    """Return how far this replica's gradient is from the other one's."""
    both = [torch.empty_like(weight.grad) for _ in range(2)]
    dist.all_gather(both, weight.grad)
    return (both[0] - both[1]).abs().max().item()


def hook_calls(kind, parts, group, x, y):
    calls = [0] * len(parts)

    def counted(k):
        def hook(_):
            calls[k] += 1

        return hook

    for k, part in enumerate(parts):
        part.weight.register_post_accumulate_grad_hook(counted(k))
    step(kind, parts, group, x, y)
    return calls


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    own = [dist.new_group([k]) for k in range(2)][rank]  # a pipeline in each process, replicas over both
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    x, y = (whole.chunk(2)[rank] for whole in (torch.randn(16, 4), torch.randn(16, 4)))
    for kind, agree, heard in (
        (ScheduleInterleaved1F1B, [True, True, True], [4, 4, 4]),
        (ScheduleInterleavedZeroBubble, [True, False, False], [4, 0, 0]),
    ):
        wrapped = [DistributedDataParallel(part) for part in copy.deepcopy(model)]
        step(kind, wrapped, own, x, y)
        differences = [apart(part.module.weight) for part in wrapped]
        calls = hook_calls(kind, copy.deepcopy(model), own, x, y)
        if rank == 0:
            print(kind.__name__, "apart:", [f"{d:.2g}" for d in differences], "hook calls:", calls, flush=True)
        assert [d == 0 for d in differences] == agree and calls == heard


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/replicas.py"
