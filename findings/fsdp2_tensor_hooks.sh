#!/usr/bin/env bash
# torch 2.13.0, FSDP2: a hook on a sharded parameter (register_hook) is never called, and what was set before sharding is lost.
#
# parameter.register_hook sees the gradient on its way to p.grad and may replace it: to keep rows of an embedding frozen, to
# clip a layer, to log norms. Under fully_shard the forward runs with another parameter, the gathered one, and FSDP writes the
# reduced gradient into p.grad of the sharded one itself. So a hook that masks rows masks nothing, and the rows train; nothing
# is raised or said. A post-accumulate hook, which is registered alike, FSDP does call. fully_shard makes new parameters, and
# leaves behind hooks of both kinds and attributes (a mark for weight decay) that the old ones had.
#
# Seen, two processes, calls in a backward and gradient of a row that a hook sets to 0 (plain 1, 0): tensor hook registered
# after fully_shard 0, 4; before 0, 4; post-accumulate hook registered after 1, 0; before 0, 4; a mark set before is gone
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/sharded.py" <<'PY'
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard


def backward(sharded, early, post):
    """Return the hook's calls, the gradient of row 0, which the hook sets to 0, and whether a mark is there."""
    torch.manual_seed(0)
    layer, calls = nn.Linear(2, 2, bias=False), []

    def mask(gradient):
        calls.append(1)
        gradient = gradient.clone()
        gradient[:1] *= 0
        return gradient

    def mask_written(parameter):
        calls.append(1)
        local = parameter.grad.to_local() if sharded and not early else parameter.grad
        if dist.get_rank() == 0:  # which has row 0
            local[:1] *= 0

    def register():
        layer.weight.register_post_accumulate_grad_hook(mask_written) if post else layer.weight.register_hook(mask)

    layer.weight.mark = True
    if early:
        register()
    if sharded:
        fully_shard(layer)
    marked = hasattr(layer.weight, "mark")
    if not early:
        register()
    layer(torch.ones(4, 2)).sum().backward()
    gradient = layer.weight.grad.full_tensor() if sharded else layer.weight.grad
    return len(calls), gradient[0, 0].item(), marked


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for sharded, early, post, expected in (
        (False, True, False, (1, 0.0, True)),
        (True, False, False, (0, 4.0, False)),
        (True, True, False, (0, 4.0, False)),
        (True, False, True, (1, 0.0, False)),
        (True, True, True, (0, 4.0, False)),
    ):
        found = backward(sharded, early, post)
        if rank == 0:
            kind, when = "post-accumulate" if post else "tensor", "before" if early else "after"
            print(f"{'sharded' if sharded else 'plain'}, {kind} hook {when}: calls, row 0, mark {found}")
        assert found == expected
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/sharded.py" 2>/dev/null
