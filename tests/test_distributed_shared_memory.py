"""Processes of one machine share memory, or none of them does: whatever keeps one of them from it."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from ranks import in_ranks

from spu.distributed import shared_memory
from spu.distributed.shared_memory import shared_places

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memory without a name")


def share(size: int) -> list[list[int]]:
    """Write to the own place, and read all."""
    rank, before = dist.get_rank(), len(os.listdir("/proc/self/fd"))
    places = shared_places(dist.group.WORLD, size)
    assert places is not None
    assert len(os.listdir("/proc/self/fd")) <= before + len(places)  # what is mapped is kept by Python's mmap alone
    assert all(place.dtype == torch.uint8 and place.shape == (size,) for place in places)
    assert not any(place.any() for place in places)
    dist.barrier()
    places[rank][-2:] = torch.tensor([rank + 1, 7 * rank])
    dist.barrier()
    return [place[-2:].tolist() for place in places]


@pytest.mark.parametrize("count", [2, 3])
def test_each_process_reads_what_all_have_written(count: int) -> None:
    wanted = [[rank + 1, 7 * rank] for rank in range(count)]
    assert in_ranks(count, share, 10_000) == [wanted] * count


def fail(how: str) -> tuple[bool, bool]:
    """Try once with a process that cannot, and once more without the obstacle."""
    odd, real = dist.get_rank() == 1, {}

    def replace(where: object, name: str, new: object) -> None:
        real[name] = where, getattr(where, name)
        setattr(where, name, new)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    shared_memory._WAIT_S = 2.0
    if odd and how == "memory":
        replace(os, "posix_fallocate", refuse)
    elif odd and how == "machine":
        replace(socket.socket, "connect", refuse)
    elif odd and how == "user":
        uid = os.getuid()
        replace(os, "getuid", lambda: uid + 1)
    elif odd and how == "map":
        replace(shared_memory, "_mapped", refuse)
    first = shared_places(dist.group.WORLD, 100, willing=not (odd and how == "unwilling"))
    for name, (where, value) in real.items():
        setattr(where, name, value)
    return first is None, shared_places(dist.group.WORLD, 100) is None


@pytest.mark.parametrize("how", ["unwilling", "memory", "machine", "user", "map"])
def test_what_one_process_cannot_none_does(how: str) -> None:
    assert in_ranks(2, fail, how) == [(True, False)] * 2
