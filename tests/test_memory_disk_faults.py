"""A disk store when the disk fails, the process forks, ends or is killed; and what it does not allocate."""

from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spu.memory import disk_file, disk_store
from spu.memory.disk_store import DiskStore
from spu.memory.host_store import HostStore
from spu.memory.slab import Slab
from spu.memory.store import ALIGNMENT, StoreError

PIECE = 16 * ALIGNMENT
SIZE = 6 * PIECE
PREADV, PWRITEV = os.preadv, os.pwritev


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_store, "PIECE_BYTES", PIECE)


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transfers in Python, whose calls to the system can be made to fail at will."""
    found = disk_file.read_in_python, disk_file.write_in_python
    monkeypatch.setattr(disk_file, "transfers", lambda: found)


@pytest.fixture(params=[True, False], ids=["direct", "cached"])
def store(request: pytest.FixtureRequest, tmp_path: Path, in_python: None) -> Any:
    made = DiskStore(tmp_path, direct=request.param)
    made.allocate(["stage 0 weights", "stage 0 state"], [SIZE, SIZE])
    yield made
    made.close()


def memory(seed: int) -> torch.Tensor:
    return Slab(SIZE).view(0, SIZE).random_(0, 256, generator=torch.Generator().manual_seed(seed))


def failing(code: int, after: int, call: Any) -> Any:
    """A system call that fails from its ``after``-th use on."""
    lock, uses = threading.Lock(), [0]

    def transfer(fd: int, buffers: Any, at: int) -> int:
        with lock:
            uses[0] += 1
            if uses[0] > after:
                raise OSError(code, os.strerror(code))
        return int(call(fd, buffers, at))

    return transfer


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_write_that_fails(store: DiskStore, monkeypatch: pytest.MonkeyPatch, code: int, after: int) -> None:
    monkeypatch.setattr(os, "pwritev", failing(code, after, PWRITEV))
    ticket = store.write(1, memory(1))
    with pytest.raises(StoreError, match=r"stage 0 state: writing 65536 bytes at byte \d+ of the file in") as caught:
        ticket.wait()
    assert os.strerror(code) in str(caught.value)
    assert str(store.folder) in str(caught.value)
    assert_refused(store)


@pytest.mark.parametrize("after", [0, 3])
def test_a_read_that_fails(store: DiskStore, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    store.write(0, memory(1)).wait()
    asked = threading.Event()
    fail = failing(errno.EIO, after, PREADV)
    monkeypatch.setattr(os, "preadv", lambda *arguments: asked.wait(20) and fail(*arguments))
    queued = [store.read(0, memory(2)) for _ in range(3)]
    asked.set()
    for ticket in queued:
        with pytest.raises(StoreError, match=r"stage 0 weights: reading 65536 bytes at .*Input/output error"):
            ticket.wait()
    assert_refused(store)


@pytest.mark.parametrize(
    ("device", "error"), [("/dev/full", "No space left"), ("/proc/self/mem", "Input/output error")]
)
def test_compiled_transfers_tell_what_the_system_says(tmp_path: Path, device: str, error: str) -> None:
    """/dev/full takes nothing; a process has no memory at its first addresses."""
    host = pytest.importorskip("spu._host", reason="spu._host is not built here")
    assert disk_file.transfers() == (host.read_at, host.write_at)
    made = DiskStore(tmp_path)
    made.allocate(["stage 0 weights", "stage 0 state"], [SIZE, SIZE])
    made.write(1, memory(1)).wait()
    assert made._parts is not None
    other = os.open(device, os.O_RDWR)
    os.dup2(other, made._parts.file._fd)
    os.close(other)
    ticket = made.write(1, memory(1)) if device == "/dev/full" else made.read(1, memory(1))
    with pytest.raises(StoreError, match=rf"stage 0 state: (reading|writing) 65536 bytes at byte \d+ .*{error}"):
        ticket.wait()
    assert_refused(made)


def assert_refused(store: DiskStore) -> None:
    """Everything is refused at once after a failure, and close returns."""
    start = time.monotonic()
    calls: list[Callable[[], object]] = [
        lambda: store.read(0, memory(2)),
        lambda: store.write(0, memory(2)),
        lambda: store.home(0),
        lambda: store.exposed([0]),
        lambda: store.hidden([0]),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="refused after an earlier failure: stage 0"):
            call()
    store.close()
    assert time.monotonic() - start < 5


def test_an_error_while_a_home_goes_to_the_disk(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.exposed([0])
    store.home(0).fill_(1)

    def fail(self: object, start: int, size: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("spu.memory.mapped.Mapped.flush", fail)
    with pytest.raises(StoreError, match=f"stage 0 weights: writing {SIZE} bytes at byte 0 .*Input/output error"):
        store.hidden([0])
    assert_refused(store)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_calls_that_move_less_than_asked_or_are_interrupted(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """The system may move any part of a transfer; direct I/O must go on at a block."""
    turn = [0]

    def part(call: Any) -> Any:
        def transfer(fd: int, buffers: Any, at: int) -> int:
            turn[0] += 1
            if turn[0] % 3 == 0:
                raise InterruptedError
            done = int(call(fd, buffers, at))
            return done if turn[0] % 3 == 1 else max(1, int(done * share))

        return transfer

    monkeypatch.setattr(os, "preadv", part(PREADV))
    monkeypatch.setattr(os, "pwritev", part(PWRITEV))
    store.write(0, memory(1)).wait()
    into = memory(2)
    store.read(0, into).wait()
    assert torch.equal(into, memory(1))


@pytest.mark.parametrize("compiled", [True, False])
def test_a_file_that_was_cut_off(store: DiskStore, compiled: bool) -> None:
    if compiled:
        host = pytest.importorskip("spu._host", reason="spu._host is not built here")
        assert store._parts is not None
        store._parts.file._read_at = host.read_at
    store.write(1, memory(1)).wait()
    assert store._parts is not None
    os.truncate(f"/proc/self/fd/{store._parts.file._fd}", SIZE + PIECE)
    with pytest.raises(StoreError, match=r"stage 0 state: reading .* gives no bytes at \d+; it may have been cut off"):
        store.read(1, memory(2)).wait()


def test_a_call_that_moves_nothing_is_an_error_not_a_loop(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at: 0)
    with pytest.raises(StoreError, match="takes no bytes"):
        store.write(0, memory(1)).wait()


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_is_refused_and_leaves_its_parents_file_alone(store: DiskStore) -> None:
    """Its close, and its end, would free blocks of a file that is its parent's too."""
    store.write(0, memory(1)).wait()
    home = store.home(1)
    home_bytes = home[:10].clone()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def body() -> None:
        said = []
        for call in (lambda: store.read(0, memory(2)), lambda: store.home(0), lambda: store.hidden([0])):
            try:
                call()
            except StoreError as error:
                said.append(str(error))
        store.close()
        there.send(said)

    child = context.Process(target=body)
    child.start()
    assert here.poll(60)
    said = here.recv()
    child.join(60)
    assert len(said) == 3
    assert all("this process was forked" in text for text in said)
    into = memory(2)
    store.read(0, into).wait()
    assert torch.equal(into, memory(1))
    assert torch.equal(home[:10], home_bytes)


def run(code: str, **settings: Any) -> subprocess.Popen[str]:
    head = (
        "import os, sys, time, torch\n"
        "from pathlib import Path\n"
        "from spu.memory.disk_store import DiskStore\n"
        "from spu.memory.slab import Slab\n"
        "store = DiskStore(sys.argv[1]); size = 64 << 20\n"
        "store.allocate(['a', 'b'], [size, size]); data = Slab(size).view(0, size)\n"
    )
    return subprocess.Popen([sys.executable, "-c", head + code, *settings.pop("args")], text=True, **settings)


def test_a_program_ends_with_requests_in_flight(tmp_path: Path) -> None:
    slow = "call = os.pwritev\nos.pwritev = lambda *a: (time.sleep(0.2), call(*a))[1]\n"
    work = "for _ in range(500): store.write(0, data)\n"
    child = run(slow + work + "store.home(0)", args=[str(tmp_path)], stderr=subprocess.DEVNULL)
    start = time.monotonic()
    try:
        child.wait(60)
        assert time.monotonic() - start < 50  # most of it imports; the queue would take half an hour
    finally:
        child.kill()
        child.wait()


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    child = run("print(os.getpid(), flush=True); time.sleep(600)", args=[str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == str(child.pid)
    held = [os.readlink(link) for link in Path(f"/proc/{child.pid}/fd").iterdir()]
    assert any(name.startswith(str(tmp_path)) and "deleted" in name for name in held)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_file_system_has_no_nameless_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return plain(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    made = DiskStore(tmp_path)
    made.allocate(["a"], [SIZE])
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    made.write(0, memory(1)).wait()
    into = memory(2)
    made.read(0, into).wait()
    assert torch.equal(into, memory(1))
    made.close()


def open_files(folder: Path) -> list[str]:
    """Return the files in a folder that this process holds open, with a name or without."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of this listing
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [name for name in found if name.startswith(f"{folder.resolve()}/")]


def test_a_store_that_is_forgotten_closes(tmp_path: Path) -> None:
    made = DiskStore(tmp_path)
    made.allocate(["a"], [SIZE])
    made.home(0)
    assert open_files(tmp_path)
    data = memory(1)
    ticket = made.write(0, data)
    del made
    gc.collect()
    ticket.wait()
    deadline = time.monotonic() + 20
    while open_files(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not open_files(tmp_path)  # the threads: see the check that no thread outlives its test


@pytest.mark.parametrize("kind", ["disk", "cached", "host"])
def test_nothing_is_allocated_in_the_steady_state(tmp_path: Path, kind: str) -> None:
    made = HostStore() if kind == "host" else DiskStore(tmp_path, direct=kind == "disk")
    made.allocate(["a", "b", "c"], [SIZE, SIZE, SIZE])
    slots = Slab(3 * SIZE).slots([SIZE] * 3)

    def turn(rounds: int) -> None:
        for k in range(rounds):
            tickets = [made.write(0, slots[0]), made.read(1, slots[1]), made.write(2, slots[2][: (k % 7) * ALIGNMENT])]
            for ticket in tickets:
                ticket.wait()

    turn(10)
    gc.collect()
    maps, files = Path("/proc/self/maps").read_text().count("\n"), len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    try:
        turn(5)
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        turn(30)  # 90 requests
        gc.collect()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - held < 16_000  # lists of free objects; a ticket or a view kept of each request would be 45 kB
    assert peak - held < 40_000  # tickets and views of three requests at a time; a piece is 64 kB
    assert Path("/proc/self/maps").read_text().count("\n") <= maps
    assert len(os.listdir("/proc/self/fd")) == files
    made.close()
