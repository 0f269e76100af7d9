"""One preallocated file without a name, read and written past the page cache where the file system allows."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spu.common.units import format_bytes, format_bytes_up
from spu.memory.store import ALIGNMENT, StoreError

__all__ = ["Bytes", "DiskFile"]

Bytes = npt.NDArray[np.uint8]

_MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs"}
_Transfer = Callable[[int, Any, int], int]
_TRIES = 16  # of a call that moves less than a block and says no error


class DiskFile:
    """A file of ``size`` zero bytes whose blocks are all reserved, and which no other program can open by name.

    It has no name (``O_TMPFILE``; where the file system lacks that, the name is removed at once). So the system frees
    its blocks when the process ends, however it ends: also after kill -9 there is nothing to clean up, and nothing of
    another run can be mistaken for it.

    Args:
        folder: where; must exist.
        size: a multiple of `ALIGNMENT`.
        direct: False asks for the page cache though direct I/O may be possible.

    Attributes:
        direct: whether reads and writes go past the page cache.
        note: why they do not; "" if they do.

    Raises:
        StoreError: the folder cannot hold such a file; names the folder, what is needed and what is free.
    """

    def __init__(self, folder: Path, size: int, *, direct: bool = True) -> None:
        self.folder = folder
        self.size = size
        self.direct = False
        self.note = ""
        try:
            self._fd = _open_nameless(folder)
        except OSError as error:
            raise StoreError(f"{folder}: no file can be made there: {error.strerror}") from error
        try:
            self._reserve()
            self.note = self._go_direct() if direct else "direct I/O was not asked for"
        except BaseException:
            os.close(self._fd)
            raise
        self.direct = not self.note
        if self.note:
            self.note = f"{folder}: {self.note}; reads and writes go through the page cache"

    def _reserve(self) -> None:
        place = os.statvfs(self._fd)
        free = place.f_bavail * place.f_frsize
        needed = f"{self.folder}: {format_bytes_up(self.size)} are needed, {format_bytes(free)} are free"
        if self.size > free:
            raise StoreError(f"{needed}; free some, or name another folder: disk=DIR:SIZE")
        try:
            if self.size:
                os.posix_fallocate(self._fd, 0, self.size)
        except OSError as error:
            raise StoreError(f"{needed}; reserving them failed: {error.strerror}") from error

    def _go_direct(self) -> str:
        """Switch to direct I/O; return why that is not possible, else ""."""
        kind = _file_system(self._fd)
        if kind in _MEMORY_FILE_SYSTEMS:
            # Linux 6.6 and later accept O_DIRECT there, and ignore it.
            return f"{kind} is memory, not a disk: the file counts against the host's memory"
        if not hasattr(os, "O_DIRECT"):
            return "this system has no direct I/O"
        import fcntl

        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT)
            with mmap.mmap(-1, ALIGNMENT) as block:  # some file systems take the flag, and refuse the first transfer
                if self.size and os.preadv(self._fd, [block], 0) != ALIGNMENT:
                    raise OSError(errno.EINVAL, "a block cannot be read alone")
        except OSError as error:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)
            return f"no direct I/O ({error.strerror})"
        return ""

    def read(self, at: int, data: Bytes) -> None:
        """Fill ``data`` with the bytes from ``at`` on; both ends of both are aligned when the file is direct.

        Raises:
            OSError: from the system, or EIO when the file ends before.
        """
        done, tries = 0, 0
        while done < len(data):
            moved = self._advance(os.preadv, at, data, done)
            if moved == 0 and (tries := tries + 1) == _TRIES:
                raise OSError(errno.EIO, f"the file gives no bytes at {at + done}; it may have been cut off")
            done += moved
        self._forget(at, len(data), None)

    def write(self, at: int, data: Bytes) -> None:
        """Write ``data`` over the bytes from ``at`` on.

        Raises:
            OSError: from the system, or EIO when it takes nothing.
        """
        done, tries = 0, 0
        while done < len(data):
            moved = self._advance(os.pwritev, at, data, done)
            if moved == 0 and (tries := tries + 1) == _TRIES:
                raise OSError(errno.EIO, f"the file takes no bytes at {at + done}")
            done += moved
        self._forget(at, len(data), at)

    def _advance(self, call: _Transfer, at: int, data: Bytes, done: int) -> int:
        """Call once, and return how far it came: in whole blocks when the file is direct, where the next can start."""
        try:
            moved = call(self._fd, [data[done:]], at + done)
        except InterruptedError:
            return 0
        return moved // ALIGNMENT * ALIGNMENT if self.direct and done + moved < len(data) else moved

    def _forget(self, at: int, size: int, written: int | None) -> None:
        """Keep the page cache small: it would push out other memory, and counts in a container.

        Advice about written pages starts to write them and drops only those that have arrived: so those of the transfer
        before are named again.
        """
        if not self.direct and hasattr(os, "posix_fadvise"):
            before = 0 if written is None else min(at, size)
            os.posix_fadvise(self._fd, at - before, size + before, os.POSIX_FADV_DONTNEED)

    def drop_cache(self, at: int, size: int) -> None:
        """Take clean pages of these bytes out of the page cache, where mappings brought them in."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, at, size, os.POSIX_FADV_DONTNEED)

    def map(self) -> mmap.mmap:
        """Return a shared mapping of the whole file; it keeps the file when this object is closed."""
        return mmap.mmap(self._fd, self.size)

    def close(self) -> None:
        """Close the file; its blocks are free when no mapping holds them."""
        os.close(self._fd)


def _open_nameless(folder: Path) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(folder, flags | os.O_TMPFILE, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT) or not folder.is_dir():
                raise
    fd, name = tempfile.mkstemp(prefix=".spu-", dir=folder)
    os.unlink(name)
    return fd


def _file_system(fd: int) -> str:
    """Return the type of the file system that a file lies on; "" if the system does not say."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            if fields.split()[2] == wanted:
                return rest.split()[0]
    except (OSError, IndexError):
        pass
    return ""
