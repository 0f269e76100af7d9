#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.pipelining: a pipeline that trains by ScheduleZBVZeroBubble cannot be evaluated.
#
# eval() is a method of every schedule; under the interleaved and zero-bubble ones it runs the forwards alone. In a V two
# neighbouring stages are in one process, where the schedule hands the gradients from one to the other, also without a
# backward: AssertionError from the stage. The step() before it works.
#
# Seen: interleaved: trained, evaluated
#       zbv: trained, AssertionError: can't steal_bwd_input if this stage doesn't have backward
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
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble


def train_and_evaluate(kind, own):
    torch.manual_seed(0)
    parts = [nn.Linear(4, 4) for _ in range(4)]
    stages = [PipelineStage(parts[k], k, 4, torch.device("cpu")) for k in own]
    schedule = kind(stages, 4, loss_fn=nn.functional.mse_loss)
    x = torch.randn(8, 4)
    first, last = 0 in own, 3 in own
    given, wanted = (x,) if first else (), {"target": x} if last else {}
    schedule.step(*given, **wanted)
    try:
        schedule.eval(*given, **wanted)
    except AssertionError as error:
        return f"trained, AssertionError: {error}"
    return "trained, evaluated"


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    loop = train_and_evaluate(ScheduleInterleaved1F1B, [[0, 2], [1, 3]][rank])
    if rank == 1:
        print("interleaved:", loop, flush=True)
    assert loop == "trained, evaluated"
    turn = "ended with the other process"
    try:
        turn = train_and_evaluate(ScheduleZBVZeroBubble, [[0, 3], [1, 2]][rank])
    except RuntimeError:  # the other process has ended
        pass
    if rank == 1:
        print("zbv:", turn, flush=True)
        assert "can't steal_bwd_input" in turn


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/evaluate.py" 2>/dev/null
