"""Regions in the host's memory: the tier below a card."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from spu.memory.io_threads import IOThreads, Request
from spu.memory.layout import Layout
from spu.memory.slab import Pinning, Slab, grouped
from spu.memory.store import Region, StoreError

__all__ = ["HostStore"]

PIECE_BYTES = 8 << 20
"""Bytes that are copied at a time: other requests get their turn in between, a millisecond apart."""


class HostStore:
    """A store in one slab of the host's memory. A region's home is the slab's memory itself.

    A card copies to and from the homes by itself; `read` and `write` are for the CPU, in a background thread.

    Args:
        pinning: how the slab is page-locked for a card; None leaves it pageable.
        limit_bytes: the most it may take; None for what the system gives.

    Attributes:
        pinned_bytes: of the slab, page-locked.
        note: why not all of it is page-locked; "" otherwise.
    """

    def __init__(self, pinning: Pinning | None = None, limit_bytes: int | None = None) -> None:
        self._pinning = pinning
        self._limit = limit_bytes
        self._layout: Layout | None = None
        self._slab: Slab | None = None
        self._threads: IOThreads | None = None
        self._closed = False
        self.pinned_bytes = 0
        self.note = ""

    def allocate(self, names: Sequence[str], sizes: Sequence[int]) -> list[Region]:
        """Take one slab for all regions, page-locked in steps of whole regions; see `Store.allocate`."""
        if self._layout is not None or self._closed:
            raise ValueError("a store is allocated once")
        layout = Layout(names, sizes)
        if self._limit is not None and layout.size > self._limit:
            raise StoreError(
                f"the host's memory: {layout.size} bytes are needed, {self._limit} are allowed; raise cpu= in the "
                "budget, or add disk=DIR:SIZE"
            )
        self._slab = Slab(layout.size, self._pinning, grouped(layout.sizes))
        self.pinned_bytes, self.note = self._slab.pinned_bytes, self._slab.note
        self._threads = IOThreads("the host's memory", 1)
        self._layout = layout
        return list(range(len(layout.sizes)))

    def read(self, region: Region, into: Tensor) -> Request:
        """Copy from the slab in a background thread; see `Store.read`."""
        return self._copy(region, into, write=False)

    def write(self, region: Region, data: Tensor) -> Request:
        """Copy into the slab in a background thread; see `Store.write`."""
        return self._copy(region, data, write=True)

    def _copy(self, region: Region, tensor: Tensor, *, write: bool) -> Request:
        layout, slab, threads = self._open()
        layout.check(region, tensor)
        size = tensor.numel()
        here = slab.view(layout.starts[region], size)
        source, target = (tensor, here) if write else (here, tensor)

        def run(piece: int) -> None:
            # Not Tensor.copy_: it would wake a team of threads of its own for every copying thread.
            at = piece * PIECE_BYTES
            ctypes.memmove(target.data_ptr() + at, source.data_ptr() + at, min(PIECE_BYTES, size - at))

        return threads.submit(run, -(-size // PIECE_BYTES), write=write)

    def home(self, region: Region) -> Tensor:
        """Return the slab's memory of a region; see `Store.home`."""
        layout, slab, _ = self._open()
        return slab.view(layout.starts[region], layout.sizes[region])

    def is_pinned(self, region: Region) -> bool:
        """Tell whether a region is page-locked as a whole; a region never is in part, but for one behind the limit."""
        layout, slab, _ = self._open()
        return slab.is_pinned(layout.starts[region], layout.sizes[region])

    def exposed(self, regions: Sequence[Region]) -> None:
        """Do nothing: the home is where reads look."""

    def hidden(self, regions: Sequence[Region]) -> None:
        """Do nothing: the home is where reads look."""

    def _open(self) -> tuple[Layout, Slab, IOThreads]:
        if self._layout is None or self._slab is None or self._threads is None:
            raise StoreError("the host's memory: the store is closed" if self._closed else "allocate regions first")
        self._threads.check()
        return self._layout, self._slab, self._threads

    def close(self) -> None:
        """Finish what is queued and give back the regions that no tensor views; see `Store.close`."""
        threads, self._threads = self._threads, None
        slab, self._slab = self._slab, None
        self._closed = True
        if threads is not None and threads.close() and slab is not None:
            slab.close(keep_viewed=True)

    def __del__(self) -> None:
        threads = getattr(self, "_threads", None)
        if threads is not None:  # the slab goes when the last copy is done
            threads.release()
