#!/usr/bin/env bash
# torch 2.13.0, DTensor: the gradient of mse_loss over rows that n processes share is n times too large.
#
# The loss is right where each has as many rows: the mean of the processes' means. Its backward divides by the rows of one
# process instead of all, and nothing divides by the number of processes. smooth_l1_loss and huber_loss are the same;
# l1_loss, binary_cross_entropy_with_logits and (x - y).square().mean() are right, so a training changes its gradients
# with the loss that it writes. AdamW and a clipped norm hide the factor. Where rows are shared unevenly, the value is
# wrong as well (a plain mean of means), and each row's factor is another one; square().mean() is right there too.
#
# Seen, rows 0 1 2 3 against 0 on two processes, loss and last row's gradient (plain: mse 3.5 and 1.5): square().mean() 3.5,
# 1.5; mse_loss 3.5, 3.0; huber 1.125, 0.5 (plain 0.25). Rows 0 0 3 (plain 3.0 and 2.0): mse_loss 4.5, 6.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/losses.py" <<'PY'
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

WRONG = {"mse_loss": F.mse_loss, "smooth_l1_loss": F.smooth_l1_loss, "huber_loss": F.huber_loss}
RIGHT = {
    "square().mean()": lambda x, y: (x - y).square().mean(),
    "l1_loss": F.l1_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}


def loss_and_gradient(loss, x):
    x = x.requires_grad_()
    value = loss(x, x.detach() * 0)
    value.backward()
    found = (value.detach(), x.grad) if type(x) is torch.Tensor else (value.full_tensor(), x.grad.full_tensor())
    return round(found[0].item(), 4), [round(number, 4) for number in found[1].flatten().tolist()]


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for rows in ([0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 3.0]):
        even = len(rows) % 2 == 0
        for name, loss in (RIGHT | WRONG).items():
            x = torch.tensor(rows)[:, None]
            plain = loss_and_gradient(loss, x.clone())
            shared = loss_and_gradient(loss, distribute_tensor(x, mesh, [Shard(0)]))
            if rank == 0:
                print(f"{rows} {name:16} plain {plain[0]} {plain[1][-1]} shared {shared[0]} {shared[1][-1]}", flush=True)
            if name in WRONG:
                factor = shared[1][-1] / plain[1][-1]
                assert abs(factor - (2 if even else 3)) < 0.01 and (shared[0] == plain[0]) == even, name
            elif even or name != "bce_with_logits":
                assert shared == plain, name
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/losses.py" 2>/dev/null
