#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.checkpoint: what each process saves under one name comes back from one of them, and not the
# same.
#
# Each process calls save() with its state and load() with the same names, and one expects its own values back, as from a file a
# process. Only sharded tensors are kept a process. Of a plain tensor, a number or a Stateful object under a name that several
# processes have, one process's value is kept, and all load that one. For the random state (torch.get_rng_state(), so that
# dropout goes on) this means that all processes go on with the same numbers; for a data loader's place, that all read the same
# rows. Which process it is differs by entry: writes are shared out by size, so of two entries that belong together one may be
# process 0's and the other process 1's. Names of one's own (f"rng{rank}") come back right. Nothing is said.
#
# Seen, two processes that save their random state, a tensor of their rank, rank + 5 and a Stateful with rank + 10: both load
# the random state of process 0, and tensor 1, number 6 and Stateful 11 of process 1; f"own{rank}" is right in both
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/own.py" <<'PY'
import socket
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp


class Loader:
    """A data loader's place, as a Stateful of torch.distributed.checkpoint."""

    def __init__(self, place):
        self.place = place

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def work(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    states = [torch.Generator().manual_seed(k).get_state() for k in range(2)]
    own = f"own{rank}"
    saved = {"rng": states[rank], "tensor": torch.full((3,), rank), "number": rank + 5, "loader": Loader(rank + 10)}
    dcp.save({**saved, own: torch.full((3,), rank)}, checkpoint_id=folder)
    found = {"rng": torch.zeros_like(states[0]), "tensor": torch.full((3,), -1), "number": -1, "loader": Loader(-1)}
    found[own] = torch.full((3,), -1)
    dcp.load(found, checkpoint_id=folder)
    origin = {
        "rng": [torch.equal(found["rng"], state) for state in states].index(True),
        "tensor": found["tensor"][0].item(),
        "number": found["number"] - 5,
        "loader": found["loader"].place - 10,
    }
    everyone = [None, None]
    dist.all_gather_object(everyone, (origin, found[own].tolist()))
    if rank == 0:
        print("loaded by process 0 and 1, from which process:", everyone, flush=True)
        assert everyone[0][0] == everyone[1][0] and set(origin.values()) == {0, 1}
        assert [values for _, values in everyone] == [[0, 0, 0], [1, 1, 1]]
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, sys.argv[1]), nprocs=2)
PY
"$folder/venv/bin/python" -W ignore "$folder/own.py" "$folder/checkpoint"
