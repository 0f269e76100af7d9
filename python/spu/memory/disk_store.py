"""Regions in a file on a disk: the tier below the host."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

from torch import Tensor

from spu.common.units import format_bytes, format_bytes_up
from spu.memory.checksum import Checksums, checksum_name
from spu.memory.disk_file import Bytes, DiskFile
from spu.memory.io_threads import IOThreads, Request
from spu.memory.layout import Layout
from spu.memory.mapped import Mapped
from spu.memory.slab import Slab
from spu.memory.store import Region, StoreError

__all__ = ["PIECE_BYTES", "DiskStore"]

PIECE_BYTES = 8 << 20
"""Bytes of a transfer, and of what one checksum covers."""

# That transfer at once. Two keep a disk busy; a third does while one waits for the interpreter's lock.
_THREADS = 3

# Frees the blocks of the file under a mapping; elsewhere than on Linux they stay until the mapping ends.
_REMOVE = getattr(mmap, "MADV_REMOVE", mmap.MADV_DONTNEED)


class DiskStore:
    """A store in one preallocated file, read and written directly, with a checksum for every `PIECE_BYTES`.

    A region's home is a view of a shared mapping of the file. Direct transfers and the mapping agree as long as they do
    not overlap in time, which is what `exposed` and `hidden` are for.

    Args:
        folder: where the file is made; it must exist.
        limit_bytes: the most that the file may take; None for what is free.
        direct: False uses the page cache though direct I/O may be possible.

    Attributes:
        direct: whether transfers go past the page cache; known after `allocate`.
        note: why they do not; "" otherwise.
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int | None = None, *, direct: bool = True) -> None:
        self.folder = Path(folder)
        self.direct = False
        self.note = ""
        self._limit = limit_bytes
        self._ask_direct = direct
        self._pid = os.getpid()
        self._closed = False
        self._parts: _Parts | None = None
        self._mapped: Mapped | None = None
        self._exposed: set[Region] = set()
        self._looked_at: set[Region] = set()  # regions whose homes somebody may have changed

    @property
    def own_bytes(self) -> int:
        """Bytes of memory that the store itself uses, beside its threads."""
        return 0 if self._parts is None else self._parts.bounce.size

    def allocate(self, names: Sequence[str], sizes: Sequence[int]) -> list[Region]:
        """Make the file, with all its blocks; see `Store.allocate`."""
        if self._parts is not None or self._closed:
            raise ValueError("a store is allocated once")
        layout = Layout(names, sizes)
        if self._limit is not None and layout.size > self._limit:
            raise StoreError(
                f"{self.folder}: {format_bytes_up(layout.size)} are needed, the budget allows "
                f"{format_bytes(self._limit)}; say disk=DIR:{format_bytes_up(layout.size).replace(' ', '')} or more"
            )
        file = DiskFile(self.folder, layout.size, direct=self._ask_direct)
        self.direct, self.note = file.direct, file.note
        self._parts = _Parts(layout, file)
        return list(range(len(layout.sizes)))

    def read(self, region: Region, into: Tensor) -> Request:
        """Read directly into ``into``, and compare the checksums; see `Store.read`."""
        return self._transfer(region, into, _Parts.read_piece, write=False)

    def write(self, region: Region, data: Tensor) -> Request:
        """Write directly from ``data``; see `Store.write`."""
        return self._transfer(region, data, _Parts.write_piece, write=True)

    def _transfer(self, region: Region, tensor: Tensor, work: _PieceWork, *, write: bool) -> Request:
        parts = self._open()
        parts.layout.check(region, tensor)
        if region in self._exposed:
            raise ValueError(f"{parts.layout.names[region]} may be changed at its home; call hidden() first")
        data: Bytes = tensor.detach().numpy()

        def run(piece: int) -> None:
            work(parts, region, piece, data)

        return parts.threads.submit(run, -(-len(data) // PIECE_BYTES), write=write)

    def home(self, region: Region) -> Tensor:
        """Return a view of the shared mapping, which is made when it is first asked for; see `Store.home`.

        An error of the disk under a mapping ends the process with SIGBUS: the system has no other way to tell it.
        """
        parts = self._open()
        if self._mapped is None and parts.layout.size:
            try:
                self._mapped = Mapped(parts.file.map())
                parts.file.backs(self._mapped, self._mapped.view(0, parts.layout.size).data_ptr())
            except (OSError, ValueError) as error:
                raise StoreError(f"{self.folder}: the file cannot be mapped: {error}") from error
        self._looked_at.add(region)
        start, size = parts.layout.starts[region], parts.layout.sizes[region]
        return Slab(0).view(0, 0) if self._mapped is None else self._mapped.view(start, size)

    def exposed(self, regions: Sequence[Region]) -> None:
        """Refuse reads and writes of these regions until `hidden`; see `Store.exposed`."""
        self._open()
        self._exposed.update(regions)

    def hidden(self, regions: Sequence[Region]) -> None:
        """Bring what was changed to the disk, and take new checksums by reading it; see `Store.hidden`.

        Only changed pages are written; all are read, so that later damage is noticed, and leave the page cache.
        Regions whose homes nobody has asked for are left out.
        """
        parts = self._open()
        changed = [region for region in dict.fromkeys(regions) if region in self._looked_at]
        for region in changed:
            start, size = parts.layout.starts[region], parts.layout.sizes[region]
            if self._mapped is not None:
                try:
                    self._mapped.flush(start, size)
                except OSError as error:
                    raise StoreError(parts.threads.fail(parts.text(region, "writing", start, size, error))) from error
                self._mapped.advise(mmap.MADV_DONTNEED, start, size)
            parts.file.drop_cache(start, size)
        for request in [parts.take_all(region) for region in changed]:
            request.wait()
        for region in changed:
            start, size = parts.layout.starts[region], parts.layout.sizes[region]
            if self._mapped is None or not self._mapped.is_viewed(start, size):
                self._looked_at.discard(region)
        self._exposed.difference_update(regions)

    def _open(self) -> _Parts:
        if self._parts is None:
            raise StoreError(f"{self.folder}: the store is closed" if self._closed else "allocate regions first")
        self._parts.threads.check()
        return self._parts

    def close(self) -> None:
        """Finish what is queued, and free the blocks of the regions that no tensor views; see `Store.close`."""
        parts, self._parts = self._parts, None
        mapped, self._mapped = self._mapped, None
        self._closed = True
        if parts is None:
            return
        # A thread that does not answer may be in the middle of a transfer: it keeps the file.
        ended = parts.threads.close()
        if mapped is not None and os.getpid() == self._pid:  # never from a forked process: the file is its parent's too
            with contextlib.suppress(OSError):  # no holes in this file system: the last tensor frees the blocks
                mapped.close(_REMOVE, keep=True)
        if ended:
            parts.bounce.close()
            parts.file.close()

    def __del__(self) -> None:
        parts = getattr(self, "_parts", None)
        if parts is not None:  # the file goes when the last transfer is done
            parts.threads.release()


class _Parts:
    """What a store has once its regions are known, and what a thread does with one piece of one of them."""

    def __init__(self, layout: Layout, file: DiskFile) -> None:
        self.layout = layout
        self.file = file
        counts = [-(-size // PIECE_BYTES) for size in layout.sizes]
        self._first_piece = [0, *accumulate(counts)]
        self._sums = Checksums(self._first_piece[-1])
        largest = min(PIECE_BYTES, max(layout.sizes, default=0))
        self.bounce = Slab(largest)  # one for all threads: it is for the ends of short transfers, and for `take_all`
        self._bounce: Bytes = self.bounce.view(0, largest).numpy()
        self._bounce_free = threading.Lock()
        self.threads = IOThreads(str(file.folder), _THREADS)

    def _place(self, region: Region, piece: int) -> tuple[int, int, int]:
        """Return the number of a region's piece among all, its place in the file and its bytes."""
        at = piece * PIECE_BYTES
        size = min(PIECE_BYTES, self.layout.sizes[region] - at)
        return self._first_piece[region] + piece, self.layout.starts[region] + at, size

    def read_piece(self, region: Region, piece: int, data: Bytes) -> None:
        number, at, size = self._place(region, piece)
        wanted = data[piece * PIECE_BYTES :][:size]
        if not self._sums.written(number):
            wanted[:] = 0
        elif len(wanted) == size:
            self._get(region, number, at, wanted)
        else:  # a checksum covers a whole piece: the rest has to be read as well
            with self._bounce_free:
                whole = self._bounce[:size]
                self._get(region, number, at, whole)
                wanted[:] = whole[: len(wanted)]

    def write_piece(self, region: Region, piece: int, data: Bytes) -> None:
        number, at, size = self._place(region, piece)
        given = data[piece * PIECE_BYTES :][:size]
        if len(given) == size:
            self._put(region, number, at, given)
            return
        with self._bounce_free:
            whole = self._bounce[:size]
            if self._sums.written(number):
                self._get(region, number, at, whole)
            else:
                whole[len(given) :] = 0
            whole[: len(given)] = given
            self._put(region, number, at, whole)

    def _put(self, region: Region, number: int, at: int, whole: Bytes) -> None:
        try:
            self._sums.set(number, self.file.write(at, whole))
        except OSError as error:
            raise StoreError(self.text(region, "writing", at, len(whole), error)) from error

    def _get(self, region: Region, number: int, at: int, whole: Bytes) -> None:
        if not self._sums.agrees(number, self._load(region, at, whole)):
            raise StoreError(
                f"{self.layout.names[region]}: the {len(whole)} bytes at byte {at} of the file in {self.file.folder} "
                f"are not those that were written ({checksum_name} differs): the disk or the memory is damaged. Go on "
                "from the last checkpoint, on another disk"
            )

    def _load(self, region: Region, at: int, whole: Bytes) -> int:
        try:
            return self.file.read(at, whole)
        except OSError as error:
            raise StoreError(self.text(region, "reading", at, len(whole), error)) from error

    def take_all(self, region: Region) -> Request:
        """Start to take checksums of what the file holds now."""

        def run(piece: int) -> None:
            number, at, size = self._place(region, piece)
            with self._bounce_free:
                self._sums.set(number, self._load(region, at, self._bounce[:size]))

        return self.threads.submit(run, -(-self.layout.sizes[region] // PIECE_BYTES))

    def text(self, region: Region, doing: str, at: int, size: int, error: OSError) -> str:
        """Return what to say of a failed transfer."""
        return (
            f"{self.layout.names[region]}: {doing} {size} bytes at byte {at} of the file in {self.file.folder} failed: "
            f"{error.strerror or error}"
        )


_PieceWork = Callable[[_Parts, Region, int, Bytes], None]
