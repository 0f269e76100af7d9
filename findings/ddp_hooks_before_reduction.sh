#!/usr/bin/env bash
# torch 2.13.0: under DistributedDataParallel a post-accumulate hook sees the process's own gradient, and steps with it.
#
# register_post_accumulate_grad_hook is called when p.grad is ready, and is how an optimizer steps in the backward, to have each
# gradient for a moment only. After backward() p.grad is the mean over all processes, and one expects the hook to see that. DDP
# begins its reduction after the hook, so the optimizer in it takes the gradient of this process's rows; the mean that comes
# later is nobody's. Whether the hook is set before or after DDP wraps the module makes no difference. Each replica trains on
# its own rows alone, all have other weights after the first step, and no error or warning says so.
#
# Seen, two processes with inputs of 1 and of 2: hooks see 1 and 2, p.grad after the backward is 1.5 in both; three steps of SGD
# in hooks: the replicas' weights differ by up to 0.07; the same steps after the backward: by 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/hooks.py" <<'PY'
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def seen(rank, first):
    """Return what a hook sees that is set before or after the wrapping, and p.grad after the backward."""
    layer, found = nn.Linear(1, 1, bias=False), []
    if first:
        layer.weight.register_post_accumulate_grad_hook(lambda p: found.append(p.grad.item()))
    replica = DistributedDataParallel(layer)
    if not first:
        layer.weight.register_post_accumulate_grad_hook(lambda p: found.append(p.grad.item()))
    replica(torch.tensor([[rank + 1.0]])).sum().backward()
    return found, layer.weight.grad.item()


def weights(rank, in_hooks):
    """Return all replicas' weights after three steps of SGD, in hooks or after each backward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    replica = DistributedDataParallel(model)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers if in_hooks else ():
        parameter.register_post_accumulate_grad_hook(step)
    for k in range(3):
        rows = torch.randn(4, 2, generator=torch.Generator().manual_seed(10 * k + rank))
        replica(rows).square().mean().backward()
        for parameter in () if in_hooks else optimizers:
            step(parameter)
    own = nn.utils.parameters_to_vector(model.parameters()).detach()
    everyone = [torch.zeros_like(own) for _ in range(2)]
    dist.all_gather(everyone, own)
    return everyone


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for first in (True, False):
        hook, after = seen(rank, first)
        print(f"process {rank}, hook set {'before' if first else 'after'} the wrapping: sees {hook}, p.grad {after}", flush=True)
        assert hook == [rank + 1.0] and after == 1.5
    distances = [(torch.sub(*weights(rank, in_hooks))).abs().max().item() for in_hooks in (True, False)]
    if rank == 0:
        print("replicas' weights differ: steps in hooks", distances[0], "after the backward", distances[1], flush=True)
    assert distances[0] > 0.01 and distances[1] == 0.0
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/hooks.py"
