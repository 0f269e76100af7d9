"""The protocol of a store: regions of bytes on a tier, read into slots and written from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["ALIGNMENT", "Region", "Store", "StoreError", "Ticket", "settle"]

ALIGNMENT = 4096
"""Bytes to which regions, slots and slabs are aligned: what direct I/O asks of memory and of offsets in a file."""

Region = int
"""A region's number in its store."""


class StoreError(RuntimeError):
    """A tier has failed: no room, a read or write error, or bytes that are not those that were written."""


class Ticket(Protocol):
    """A read or a write in progress."""

    def wait(self) -> None:
        """Return when it is done; may be called again, from any thread.

        Raises:
            StoreError: it failed; names the region, the file and the system's reason.
        """


class Store(Protocol):
    """Regions of bytes on one tier. All are allocated at the start; nothing is allocated while they are used.

    Reads and writes of one region never overlap: the caller waits for one before it starts the next. Those of several
    regions may: a store takes reads in the order in which they were asked for, writes likewise, and reads and writes in
    turns. After the first failure of its tier every call but `close` raises `StoreError` at once; so does every call in
    a forked process, which has the memory but not the threads.
    """

    def allocate(self, names: Sequence[str], sizes: Sequence[int]) -> list[Region]:
        """Reserve regions, zeros at first, and return their numbers; called once.

        Args:
            names: of the regions, for messages.
            sizes: bytes of each; multiples of `ALIGNMENT`.

        Raises:
            StoreError: there is no room for all of them; says how much is needed and how much is there.
            ValueError: for sizes that are not aligned.
        """

    def read(self, region: Region, into: Tensor) -> Ticket:
        """Start to copy the first bytes of a region into ``into``: uint8, contiguous, on the CPU, aligned at both ends.

        Raises:
            ValueError: for another tensor.
        """

    def write(self, region: Region, data: Tensor) -> Ticket:
        """Start to copy ``data`` (likewise) over the first bytes of a region."""

    def home(self, region: Region) -> Tensor:
        """Return the region itself as uint8 memory, to look at and to change between runs.

        Its storage is the region and nothing else. A store that keeps checksums cannot know what is changed there: call
        `exposed` first.
        """

    def exposed(self, regions: Sequence[Region]) -> None:
        """Note that these regions' homes may be changed from now on, until `hidden`: no reads or writes in between."""

    def hidden(self, regions: Sequence[Region]) -> None:
        """Take the present bytes of these regions' homes as theirs; reads see them from now on."""

    def close(self) -> None:
        """Give the room back, waiting for what is in progress; harmless when called twice.

        A home that a tensor still views stays as it is until the last such tensor is gone: a model is not emptied
        behind its user's back.
        """


def settle(tickets: Iterable[Ticket]) -> None:
    """Wait for tickets whose outcome does not matter any more."""
    for ticket in tickets:
        with contextlib.suppress(Exception):
            ticket.wait()
