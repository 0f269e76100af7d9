"""One preallocated file without a name, read and written past the page cache where the file system allows."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spu.common.file_memory import backed
from spu.common.units import format_bytes, format_bytes_up
from spu.memory.checksum import checksum, compiled
from spu.memory.store import ALIGNMENT, StoreError

__all__ = ["Bytes", "DiskFile", "read_in_python", "transfers", "write_in_python"]

Bytes = npt.NDArray[np.uint8]

_MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs"}
# linux/fs.h: FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_NOCOW_FL
_GET_FLAGS, _SET_FLAGS, _NO_COPY_ON_WRITE = 0x80086601, 0x40086602, 0x00800000
_TRIES = 16  # of a call that moves less than a block and says no error

_Transfer = Callable[[int, Bytes, int, int], tuple[int, int]]


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
            _write_in_place(self._fd)
            self._reserve()
            self.note = self._go_direct() if direct else "direct I/O was not asked for"
        except BaseException:
            self.close()
            raise
        self.direct = not self.note
        self._read_at, self._write_at = transfers()
        if self.note:
            self.note = f"{folder}: {self.note}; reads and writes go through the page cache"

    def _reserve(self) -> None:
        free = self._free_bytes()
        if self.size > free:
            os.sync()  # btrfs counts what was freed as free when it has been written down
            free = self._free_bytes()
        needed = f"{self.folder}: {format_bytes_up(self.size)} are needed, {format_bytes(free)} are free"
        if self.size > free:
            raise StoreError(f"{needed}; free some, or name another folder: disk=DIR:SIZE")
        try:
            if self.size:
                os.posix_fallocate(self._fd, 0, self.size)
        except OSError as error:
            raise StoreError(f"{needed}; reserving them failed: {error.strerror}") from error

    def _free_bytes(self) -> int:
        place = os.statvfs(self._fd)
        return place.f_bavail * place.f_frsize

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

    def read(self, at: int, data: Bytes) -> int:
        """Fill ``data`` with the bytes from ``at`` on, and return their checksum.

        Both ends of both are aligned when the file is direct.

        Raises:
            OSError: from the system, or EIO when the file ends before.
        """
        done, found = self._read_at(self._fd, data, at, ALIGNMENT if self.direct else 1)
        if done < len(data):
            raise OSError(errno.EIO, f"the file gives no bytes at {at + done}; it may have been cut off")
        if not self.direct:
            self.drop_cache(at, len(data))
        return found

    def write(self, at: int, data: Bytes) -> int:
        """Write ``data`` over the bytes from ``at`` on, and return their checksum.

        Raises:
            OSError: from the system, or EIO when it takes nothing.
        """
        done, found = self._write_at(self._fd, data, at, ALIGNMENT if self.direct else 1)
        if done < len(data):
            raise OSError(errno.EIO, f"the file takes no bytes at {at + done}")
        if not self.direct:
            os.fdatasync(self._fd)  # else a fast writer fills the memory with pages that cannot be dropped
            self.drop_cache(at, len(data))
        return found

    def drop_cache(self, at: int, size: int) -> None:
        """Take pages of these bytes that are on the disk out of the page cache: a container counts them as memory.

        The advice passes over what was read ahead in larger units than ``size`` and sticks out of the range: so it goes
        back as far again, over what was read before.
        """
        if hasattr(os, "posix_fadvise"):
            before = min(at, size)
            os.posix_fadvise(self._fd, at - before, before + size, os.POSIX_FADV_DONTNEED)

    def map(self) -> mmap.mmap:
        """Return a shared mapping of the whole file; it keeps the file when this object is closed."""
        return mmap.mmap(self._fd, self.size)

    def backs(self, mapped: object, address: int) -> None:
        """Let `copy_in` write to this file where memory from ``address`` on is its mapping, while ``mapped`` lives."""
        backed(mapped, address, self.size, self._fd)

    def close(self) -> None:
        """Close the file; its blocks are free when no mapping holds them. Harmless when called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


def transfers() -> tuple[_Transfer, _Transfer]:
    """Return what reads and what writes (fd, data, at, block), as ``spu._host.read_at`` and ``write_at`` do.

    A compiled transfer takes the interpreter's lock once, one in Python after each call to the system and each sum:
    beside a thread that runs Python it is half as fast.
    """
    if compiled is not None:
        return compiled.read_at, compiled.write_at
    return read_in_python, write_in_python


def read_in_python(fd: int, data: Bytes, at: int, block: int) -> tuple[int, int]:
    """Do what ``spu._host.read_at`` does."""
    done = _move_all(os.preadv, fd, data, at, block)
    return done, checksum(data) if done == len(data) else 0


def write_in_python(fd: int, data: Bytes, at: int, block: int) -> tuple[int, int]:
    """Do what ``spu._host.write_at`` does."""
    done = _move_all(os.pwritev, fd, data, at, block)
    return done, checksum(data) if done == len(data) else 0


def _move_all(call: Callable[[int, Any, int], int], fd: int, data: Bytes, at: int, block: int) -> int:
    done = tries = 0
    while done < len(data) and tries < _TRIES:
        try:
            moved = call(fd, [data[done:]], at + done)
        except InterruptedError:
            continue
        if done + moved < len(data):
            moved -= moved % block
        tries = 0 if moved else tries + 1
        done += moved
    return done


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


def _write_in_place(fd: int) -> None:
    """Ask a copy-on-write file system to write this file, still empty, where its blocks are.

    btrfs writes elsewhere what is written again, also in reserved blocks: a file of 90% of what was free ran out of
    space in the second round. It also keeps checksums, and without them transfers are direct. Other file systems
    refuse: they write in place.
    """
    with contextlib.suppress(OSError, ImportError):
        import fcntl

        flags = bytearray(8)  # the system reads and writes 4 of them, whatever the number of the call says
        fcntl.ioctl(fd, _GET_FLAGS, flags)
        value = int.from_bytes(flags[:4], sys.byteorder) | _NO_COPY_ON_WRITE
        fcntl.ioctl(fd, _SET_FLAGS, value.to_bytes(4, sys.byteorder) + bytes(4))


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
