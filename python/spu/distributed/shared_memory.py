"""Memory that the processes of one machine share: each writes a place of its own, and reads the others'.

The places have no name in any file system: a process hands its place's descriptor on through a socket, so nothing is
left behind, however a process ends, and a container's small /dev/shm is no limit. Sockets are found within one network
namespace: processes that are to see one another as machines do not share.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import uuid
from contextlib import ExitStack

import torch
import torch.distributed as dist

from spu.distributed.collectives import summed

__all__ = ["shared_places"]

_WAIT_S = 20.0
"""For a process that has said that it is there."""


def shared_places(group: dist.ProcessGroup, size: int, *, willing: bool = True) -> list[torch.Tensor] | None:
    """Return the places of a group's processes, by rank; called in each of them.

    Args:
        group: whose processes may be on several machines.
        size: bytes of each place.
        willing: whether this process would share; False in one is None in all.

    Returns:
        uint8 [size] for each process, 0 at first, writable; None where they cannot share: on several machines, as
        several users, without memory for it, or not on Linux.
    """
    with ExitStack() as stack:
        try:
            place, door = _place(size, stack) if willing else (-1, None)
        except (OSError, AttributeError):  # AttributeError: this system has no such memory, or no such sockets
            place, door = -1, None
        name = "" if door is None else door.getsockname().decode("latin-1")
        names: list[str] = ["" for _ in range(group.size())]
        dist.all_gather_object(names, name, group=group)
        if door is None or not all(names):
            return None
        own = group.rank()
        try:
            visits = {rank: _visit(other, stack) for rank, other in enumerate(names) if rank != own}
        except OSError:
            visits = None
        if not _all(visits is not None, group) or visits is None:
            return None
        try:
            _hand_on(place, door, len(visits), stack)
            places = {rank: _mapped(_received(visit, stack), size) for rank, visit in visits.items()}
            places[own] = _mapped(place, size)
        except OSError:
            places = {}
        return [places[rank] for rank in range(len(names))] if _all(bool(places), group) else None


def _place(size: int, stack: ExitStack) -> tuple[int, socket.socket]:
    """Return the descriptor of new memory, and the socket at which the others ask for it."""
    place = os.memfd_create("spu")
    stack.callback(os.close, place)
    os.posix_fallocate(place, 0, max(1, size))  # an error here, and no signal later, where there is not so much
    door = stack.enter_context(socket.socket(socket.AF_UNIX))
    door.settimeout(_WAIT_S)
    door.bind(f"\0spu-{uuid.uuid4().hex}".encode())
    door.listen(128)
    return place, door


def _visit(name: str, stack: ExitStack) -> socket.socket:
    visit = stack.enter_context(socket.socket(socket.AF_UNIX))
    visit.settimeout(_WAIT_S)
    visit.connect(name.encode("latin-1"))
    return visit


def _hand_on(place: int, door: socket.socket, others: int, stack: ExitStack) -> None:
    """Give the descriptor to so many processes of this user."""
    while others:
        visitor = stack.enter_context(door.accept()[0])
        facts = visitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", facts)[1] == os.getuid():
            socket.send_fds(visitor, [b"x"], [place])
            others -= 1


def _received(visit: socket.socket, stack: ExitStack) -> int:
    _, places, _, _ = socket.recv_fds(visit, 1, 1)
    if not places:
        raise OSError("another user's process")
    stack.callback(os.close, places[0])
    return places[0]


def _mapped(place: int, size: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(place, max(1, size)), dtype=torch.uint8)[:size]


def _all(good: bool, group: dist.ProcessGroup) -> bool:
    """Tell whether all processes say so."""
    return not summed(torch.tensor(float(not good), device="cpu"), group).item()
