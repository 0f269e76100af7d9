"""Stores below a device beside what anyone would write: loops of system calls, torch.save and torch.load, a copy.

The folder is pytest's temporary one: `--basetemp DIR` for the disk that is meant. Bytes are those moved once, so the
share of the copy ceiling (read + written) says little for a disk.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Measure

from spu.memory.checksum import checksum, checksum_name
from spu.memory.disk_store import PIECE_BYTES, DiskStore
from spu.memory.host_store import HostStore
from spu.memory.slab import Slab

SIZE = 256 << 20
SHAPE = f"{SIZE >> 20} MiB"


@pytest.fixture
def data() -> Iterator[torch.Tensor]:
    slab = Slab(SIZE)
    slab.view(0, SIZE).view(torch.int64).random_()
    yield slab.view(0, SIZE)
    slab.close()


@pytest.fixture(params=["direct", "cached"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DiskStore]:
    made = DiskStore(tmp_path, direct=request.param == "direct")
    made.allocate(["stage 0 weights", "stage 1 weights"], [SIZE, SIZE])
    if request.param == "direct" and not made.direct:
        pytest.skip(made.note)
    yield made
    made.close()


def name(store: DiskStore) -> str:
    return "spu direct" if store.direct else "spu cached"


def test_write(measure: Measure, store: DiskStore, data: torch.Tensor) -> None:
    measure("disk write", SHAPE, name(store), lambda: store.write(0, data).wait(), bytes_=SIZE)


def test_read(measure: Measure, store: DiskStore, data: torch.Tensor) -> None:
    store.write(0, data).wait()
    measure("disk read", SHAPE, name(store), lambda: store.read(0, data).wait(), bytes_=SIZE)


def test_both_ways(measure: Measure, store: DiskStore, data: torch.Tensor) -> None:
    store.write(0, data).wait()
    into = Slab(SIZE).view(0, SIZE)

    def both() -> None:
        for ticket in (store.read(0, into), store.write(1, data)):
            ticket.wait()

    measure("disk read + write", f"2 x {SHAPE}", name(store), both, bytes_=2 * SIZE)


def forget(fd: int) -> None:
    """Take a file out of the page cache, as if it had been written long ago."""
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


LOOPS = pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["cached loop", "direct loop"])


@LOOPS
def test_write_loop(measure: Measure, tmp_path: Path, data: torch.Tensor, flags: int) -> None:
    """One thread, `PIECE_BYTES` at a time, as dd does, without checksums; cached until all is on the disk."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | flags, 0o600)
    os.posix_fallocate(fd, 0, SIZE)

    def write() -> None:
        loop(os.pwritev, fd, data)
        if not flags:
            os.fsync(fd)

    measure("disk write", SHAPE, "direct loop" if flags else "cached loop", write, bytes_=SIZE)
    os.close(fd)


@LOOPS
def test_read_loop(measure: Measure, tmp_path: Path, data: torch.Tensor, flags: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(data.numpy().data)
    fd = os.open(path, os.O_RDONLY | flags)

    def read() -> None:
        forget(fd)
        loop(os.preadv, fd, data)

    measure("disk read", SHAPE, "direct loop" if flags else "cached loop", read, bytes_=SIZE)
    os.close(fd)


def loop(call: Callable[..., int], fd: int, data: torch.Tensor) -> None:
    view = memoryview(data.numpy())
    for at in range(0, SIZE, PIECE_BYTES):
        call(fd, [view[at : at + PIECE_BYTES]], at)


def test_torch_save(measure: Measure, tmp_path: Path, data: torch.Tensor) -> None:
    path = tmp_path / "file.pt"

    def save() -> None:
        torch.save(data, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())

    measure("disk write", SHAPE, "torch.save", save, bytes_=SIZE)


def test_torch_load(measure: Measure, tmp_path: Path, data: torch.Tensor) -> None:
    path = tmp_path / "file.pt"
    torch.save(data, path)

    def load() -> None:
        with open(path, "rb") as file:
            forget(file.fileno())
        torch.load(path)

    measure("disk read", SHAPE, "torch.load", load, bytes_=SIZE)


def test_host_store(measure: Measure, data: torch.Tensor) -> None:
    made = HostStore()
    made.allocate(["stage 0 weights"], [SIZE])
    made.write(0, data).wait()
    home, into = made.home(0), torch.empty_like(data)
    measure(
        "host read", SHAPE, "spu", lambda: made.read(0, data).wait(), bytes_=2 * SIZE,
        paired={"Tensor.copy_": lambda: into.copy_(home)},
    )  # fmt: skip
    made.close()


def test_checksum(measure: Measure, data: torch.Tensor) -> None:
    """A core's share of what a disk moves: with both figures, what checking costs."""
    view = data.numpy()
    measure("checksum", SHAPE, f"spu {checksum_name}", lambda: checksum(view), bytes_=SIZE, intensity=1)


def test_plain_mapping(measure: Measure, tmp_path: Path, data: torch.Tensor) -> None:
    """The other way to read a file into tensors: torch.from_file and page faults."""
    path = tmp_path / "file"
    path.write_bytes(data.numpy().data)

    def read() -> None:
        with open(path, "rb") as file:
            forget(file.fileno())
            with mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ) as mapping:
                data.numpy()[:] = memoryview(mapping)

    measure("disk read", SHAPE, "mapping", read, bytes_=SIZE)
