"""The connections that process groups over gloo have made: a sum that is under way can only be given up by ending them.

gloo has no call for it: whoever ends a group waits for its collectives, until the others have come or the group's
timeout has passed. A process that has failed would be held so long, and with it the job. Connections that have been
shut down end them at once, here and in the others.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Connections"]

_OWN = Path("/proc/self/fd")


class Connections:
    """The sockets that were made in some blocks of code; empty where the system does not show them."""

    def __init__(self) -> None:
        self._made: set[tuple[int, int]] = set()  # descriptor and inode: a number may be given again

    @contextlib.contextmanager
    def made_here(self) -> Iterator[None]:
        """Remember the sockets that this process makes in the block."""
        before = _sockets()
        yield
        self._made |= _sockets() - before

    def shut_down(self) -> None:
        """End those that are still there; their descriptors stay their owner's."""
        for number, _ in self._made & _sockets():
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as own:
                if not own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):  # gloo throws where a listener ends
                    own.shutdown(socket.SHUT_RDWR)
        self._made.clear()


def _sockets() -> set[tuple[int, int]]:
    found = set()
    for number in map(int, os.listdir(_OWN)) if _OWN.is_dir() else ():
        with contextlib.suppress(OSError):  # gone since
            about = os.fstat(number)
            if stat.S_ISSOCK(about.st_mode):
                found.add((number, about.st_ino))
    return found
