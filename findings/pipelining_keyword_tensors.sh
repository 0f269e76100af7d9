#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.pipelining: a tensor given by keyword is cut like the batch, whatever its first dimension is.
#
# schedule.step(x, bank=bank) is how a stage gets a tensor beside the batch: shared vectors to attend to, prototypes, a table.
# It is cut in as many pieces as there are microbatches, by its own first dimension, though that has nothing to do with the
# number of rows: of 16 vectors each of 4 microbatches sees 4, other ones each. Where shapes have to fit, the stage raises; an
# attention, a nearest neighbour, a mean take any number, and give another model's loss and gradients. A tensor with fewer rows
# than microbatches raises. kwargs_chunk_spec={"bank": _Replicate} of the schedule gives each the whole; that it is needed,
# nothing says.
#
# Seen, 8 rows, 4 microbatches, a bank of 16 vectors: banks of 4 in the stage; the gradient is off by 81%, and is that of
# quarters of the bank; with _Replicate it is right
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
from torch.distributed.pipelining.microbatch import _Replicate


class First(nn.Module):
    """Attends from each row to a bank of vectors."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(4, 4), []

    def forward(self, x, bank):
        self.seen.append(len(bank))
        return (self.layer(x) @ bank.T).softmax(-1) @ bank


def gradient(parts, pieces):
    """Return the first layer's gradient without a pipeline, of pairs of rows and banks."""
    first, second = copy.deepcopy(parts)
    for (rows, targets), bank in pieces:
        (nn.functional.mse_loss(second(first(rows, bank)), targets) / 4).backward()
    return first.layer.weight.grad


def off(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def work(rank, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    parts = [First(), nn.Linear(4, 4)]
    x, y, bank = torch.randn(8, 4), torch.randn(8, 4), 2 * torch.randn(16, 4)
    rows = list(zip(x.chunk(4), y.chunk(4)))
    right, quarters = gradient(parts, zip(rows, [bank] * 4)), gradient(parts, zip(rows, bank.chunk(4)))
    for spec in (None, {"bank": _Replicate}):
        part = copy.deepcopy(parts)[rank]
        stage = PipelineStage(part, rank, 2, torch.device("cpu"))
        schedule = ScheduleGPipe(stage, 4, loss_fn=nn.functional.mse_loss, kwargs_chunk_spec=spec if rank == 0 else None)
        if rank == 0:
            schedule.step(x, bank=bank)
            got = part.layer.weight.grad
            print(f"spec {spec}: banks of {set(part.seen)}, off by {off(got, right):.2g}, quarters {off(got, quarters):.2g}")
            assert set(part.seen) == {4 if spec is None else 16}
            wanted, other = (quarters, right) if spec is None else (right, quarters)
            assert off(got, wanted) < 1e-5 and off(got, other) > 0.2
        else:
            schedule.step(target=y)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/step.py" 2>/dev/null
