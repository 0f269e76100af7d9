"""A file read and written whole: the compiled transfers and those in Python do the same."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spu.memory.checksum import checksum
from spu.memory.disk_file import DiskFile, read_in_python, write_in_python
from spu.memory.store import StoreError

host = pytest.importorskip("spu._host", reason="spu._host is not built here")

READS = pytest.mark.parametrize("read", [host.read_at, read_in_python], ids=["compiled", "python"])
WRITES = pytest.mark.parametrize("write", [host.write_at, write_in_python], ids=["compiled", "python"])
Move = Callable[[int, Any, int, int], tuple[int, int]]
BYTES = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    found = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(found, BYTES.data)
    yield found
    os.close(found)


@READS
@pytest.mark.parametrize(("at", "size"), [(0, 50_000), (1, 49_999), (777, 4096), (49_999, 1), (5, 0)])
def test_what_is_read(fd: int, read: Move, at: int, size: int) -> None:
    into = np.zeros(size, np.uint8)
    assert read(fd, into, at, 1) == (size, checksum(BYTES[at : at + size]))
    assert np.array_equal(into, BYTES[at : at + size])


@READS
@pytest.mark.parametrize(("block", "done"), [(1, 10_000), (4096, 8192)])
def test_the_end_of_a_file_is_told_in_whole_blocks(fd: int, read: Move, block: int, done: int) -> None:
    into = np.zeros(20_000, np.uint8)
    assert read(fd, into, 40_000, block)[0] == done
    assert np.array_equal(into[:done], BYTES[40_000 : 40_000 + done])


@WRITES
def test_what_is_written(fd: int, write: Move) -> None:
    data = BYTES[::-1].copy()[:10_000]
    assert write(fd, data, 300, 1) == (10_000, checksum(data))
    assert os.pread(fd, 60_000, 0) == BYTES[:300].tobytes() + data.tobytes() + BYTES[10_300:].tobytes()


@READS
@WRITES
def test_errors_are_the_systems(read: Move, write: Move) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        read(-1, np.zeros(4, np.uint8), 0, 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        write(-1, np.zeros(4, np.uint8), 0, 1)


def test_compiled_transfers_refuse_memory_that_is_not_theirs(fd: int) -> None:
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        host.read_at(fd, np.zeros(16, np.uint8)[::2], 0, 1)
    with pytest.raises((BufferError, ValueError), match="[wW]ritable|read-only"):
        host.read_at(fd, b"constant", 0, 1)
    with pytest.raises(ValueError, match="block of 0"):
        host.read_at(fd, bytearray(4), 0, 0)
    assert host.write_at(fd, b"constant", 0, 1)[0] == 8


def cached_bytes(file: DiskFile) -> int:
    """Bytes of a file in the page cache."""
    with file.map() as mapping:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        pages = (ctypes.c_ubyte * (file.size // mmap.PAGESIZE))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(file.size), pages) == 0
        gc.collect()
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.parametrize("kind", ["write", "read"])
def test_the_page_cache_stays_small(tmp_path: Path, kind: str) -> None:
    """What goes through the cache is asked to leave it: a container counts it."""
    size, step = 64 << 20, 1 << 20
    file = DiskFile(tmp_path, size, direct=False)
    data = np.ones(step, np.uint8)
    for at in range(0, size, step):
        file.write(at, data)
    if kind == "read":
        os.fsync(file._fd)
        for at in range(0, size, step):
            file.read(at, data)
    assert cached_bytes(file) <= size // 8
    file.close()


def test_a_copy_on_write_file_system_is_asked_to_write_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On btrfs a reserved file that fills most of the disk could be written only once."""
    asked: list[int] = []

    def ioctl(fd: int, request: int, flags: Any) -> int:
        assert os.fstat(fd).st_size == 0
        if request == 0x80086601:
            flags[:4] = (0x10).to_bytes(4, sys.byteorder)
        else:
            assert request == 0x40086602
            asked.append(int.from_bytes(flags[:4], sys.byteorder))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    DiskFile(tmp_path, 4096).close()
    assert asked == [0x00800010]


def test_room_that_is_counted_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """btrfs counts the blocks of a file that was just closed when they have been written down: after a sync."""
    synced: list[bool] = []
    monkeypatch.setattr(os, "sync", lambda: synced.append(True))
    monkeypatch.setattr(DiskFile, "_free_bytes", lambda self: 1 << 20 if synced else 0)
    file = DiskFile(tmp_path, 1 << 20)
    assert synced == [True]
    file.close()
    with pytest.raises(StoreError, match=r"2\.10 MB are needed, 1\.05 MB are free"):
        DiskFile(tmp_path, 2 << 20)
