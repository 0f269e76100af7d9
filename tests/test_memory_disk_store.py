"""A store on a disk, on real files: what is written is read, in both ways, and damage and failures are told."""

from __future__ import annotations

import errno
import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hard_limit import run_limited

from spu.memory import disk_store
from spu.memory.disk_file import _file_system
from spu.memory.disk_store import DiskStore
from spu.memory.slab import Slab
from spu.memory.store import ALIGNMENT, StoreError

PIECE = 16 * ALIGNMENT
SIZES = [5 * PIECE, ALIGNMENT, 2 * PIECE + 3 * ALIGNMENT, 0]
NAMES = [f"stage {k} weights" for k in range(len(SIZES))]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_store, "PIECE_BYTES", PIECE)


@pytest.fixture(params=[True, False], ids=["direct", "cached"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    made = DiskStore(tmp_path, direct=request.param)
    made.allocate(NAMES, SIZES)
    if request.param and not made.direct:
        pytest.skip(made.note)
    yield made
    made.close()


def memory(size: int, seed: int | None = None) -> torch.Tensor:
    found = Slab(size).view(0, size)
    if seed is not None:
        found.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return found


def read(store: DiskStore, region: int, size: int | None = None) -> torch.Tensor:
    into = memory(SIZES[region] if size is None else size)
    into.fill_(99)
    store.read(region, into).wait()
    return into


def raw(store: DiskStore) -> int:
    """A descriptor of its own of the store's file, which has no name."""
    assert store._parts is not None
    return os.open(f"/proc/self/fd/{store._parts.file._fd}", os.O_RDWR)


def test_what_was_written_is_read(store: DiskStore) -> None:
    written = [memory(size, seed) for seed, size in enumerate(SIZES)]
    for ticket in [store.write(region, data) for region, data in enumerate(written)]:
        ticket.wait()
    into = [memory(size) for size in SIZES]
    for ticket in [store.read(region, data) for region, data in enumerate(into)]:
        ticket.wait()
    assert all(torch.equal(a, b) for a, b in zip(into, written, strict=True))


def test_a_region_is_zeros_before_it_is_written(store: DiskStore) -> None:
    store.write(0, memory(SIZES[0], 1)).wait()
    assert not read(store, 2).any()
    assert not store.home(2).any()


@pytest.mark.parametrize("blocks", [1, 15, 16, 17, 40])
def test_the_first_bytes_of_a_region(store: DiskStore, blocks: int) -> None:
    """Less than a region, also less than the bytes of one checksum, over zeros and over what was there."""
    size = blocks * ALIGNMENT
    expected = torch.zeros(SIZES[0], dtype=torch.uint8)
    expected[:size] = memory(size, 1)
    store.write(0, memory(size, 1)).wait()
    assert torch.equal(read(store, 0), expected)
    whole = memory(SIZES[0], 2)
    store.write(0, whole).wait()
    store.write(0, memory(size, 3)).wait()
    expected = whole.clone()
    expected[:size] = memory(size, 3)
    assert torch.equal(read(store, 0), expected)
    assert torch.equal(read(store, 0, size), expected[:size])


def test_the_home_sees_direct_writes_and_reads_see_the_home(store: DiskStore) -> None:
    """Two ways to one file: the mapping through the page cache, the transfers past it."""
    home = store.home(0)
    for turn in range(5):
        data = memory(SIZES[0], turn)
        store.write(0, data).wait()
        assert torch.equal(home, data)
        store.exposed([0])
        home[turn * 7000 : turn * 7000 + 9] = turn
        home[-1] = turn
        store.hidden([0])
        expected = data.clone()
        expected[turn * 7000 : turn * 7000 + 9] = turn
        expected[-1] = turn
        assert torch.equal(read(store, 0), expected)


def test_a_home_that_nobody_changed_is_as_before(store: DiskStore) -> None:
    data = memory(SIZES[2], 4)
    store.write(2, data).wait()
    store.exposed([1, 2, 3])
    assert torch.equal(store.home(2), data)
    store.hidden([1, 2, 3])
    assert torch.equal(read(store, 2), data)
    assert store.home(3).numel() == 0


def test_a_home_has_its_regions_storage(store: DiskStore) -> None:
    assert [store.home(k).untyped_storage().nbytes() for k in range(3)] == SIZES[:3]
    assert store.home(1).data_ptr() % ALIGNMENT == 0


def test_reads_and_writes_of_an_exposed_region_are_refused(store: DiskStore) -> None:
    store.exposed([0])
    with pytest.raises(ValueError, match=r"stage 0 weights.*hidden\(\)"):
        store.read(0, memory(ALIGNMENT))
    store.write(1, memory(ALIGNMENT, 1)).wait()
    store.hidden([0])
    read(store, 0)


def test_a_change_at_home_without_exposed_is_damage(store: DiskStore) -> None:
    store.write(0, memory(SIZES[0], 1)).wait()
    store.home(0)[3] += 1
    with pytest.raises(StoreError, match="not those that were written"):
        read(store, 0)


@pytest.mark.parametrize("place", [0, PIECE - 1, PIECE, 5 * PIECE - 1])
def test_one_damaged_bit_is_found_and_its_place_named(store: DiskStore, place: int) -> None:
    store.write(0, memory(SIZES[0], 1)).wait()
    other = raw(store)
    old = os.pread(other, 1, place)
    os.pwrite(other, bytes([old[0] ^ 4]), place)
    os.fsync(other)
    os.close(other)
    piece = place // PIECE * PIECE
    with pytest.raises(StoreError, match=rf"stage 0 weights: the {PIECE} bytes at byte {piece} .*damaged") as caught:
        read(store, 0)
    assert str(store.folder) in str(caught.value)
    with pytest.raises(StoreError, match="refused after an earlier failure"):
        store.read(1, memory(ALIGNMENT))


def test_damage_behind_what_is_read_is_found_where_it_shares_a_checksum(store: DiskStore) -> None:
    store.write(2, memory(SIZES[2], 1)).wait()
    other = raw(store)
    os.pwrite(other, b"damage", SIZES[0] + SIZES[1] + 10 * ALIGNMENT)
    os.close(other)
    with pytest.raises(StoreError, match="stage 2 weights"):
        read(store, 2, ALIGNMENT)


def test_damage_after_hidden_is_found(store: DiskStore) -> None:
    store.exposed([1])
    store.home(1).fill_(5)
    store.hidden([1])
    other = raw(store)
    os.pwrite(other, b"\x06", SIZES[0] + 100)
    os.close(other)
    with pytest.raises(StoreError, match="stage 1 weights"):
        read(store, 1)


def test_hidden_reads_only_what_may_have_been_changed(store: DiskStore) -> None:
    """A home that nobody has seen keeps its checksums: gradients, when a model's weights are shown."""
    store.write(0, memory(SIZES[0], 1)).wait()
    store.write(2, memory(SIZES[2], 2)).wait()
    regions = [0, 1, 2, 3]
    held = store.home(2)  # from before: it may be changed in every span from exposed to hidden
    for value in (5, 6):
        store.exposed(regions)
        held.fill_(value)
        store.hidden(regions)
        assert bool((read(store, 2) == value).all())
    other = raw(store)
    os.pwrite(other, b"damage", 0)
    os.close(other)
    store.exposed(regions)
    store.hidden(regions)
    with pytest.raises(StoreError, match="stage 0 weights"):
        read(store, 0)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: memory(8192)[: 2 * ALIGNMENT : 2], "contiguous"),
        (lambda: memory(8192).view(torch.float32), "float32"),
        (lambda: memory(8192)[1:4097], "aligned"),
        (lambda: memory(8192)[:100], "aligned"),
        (lambda: memory(SIZES[0] + ALIGNMENT), "has 327680 bytes"),
        (lambda: torch.empty(4096, dtype=torch.uint8, device="meta"), "meta"),
    ],
)
def test_memory_that_does_not_fit_is_refused(store: DiskStore, tensor: Any, message: str) -> None:
    for call in (store.read, store.write):
        with pytest.raises(ValueError, match=message):
            call(0, tensor())
    with pytest.raises(ValueError, match="region 4 of 4"):
        store.read(4, memory(ALIGNMENT))


def test_regions_are_checked_and_allocated_once(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    with pytest.raises(StoreError, match="allocate"):
        store.home(0)
    with pytest.raises(ValueError, match="a has 100 bytes; round up to a multiple of 4096"):
        store.allocate(["a"], [100])
    with pytest.raises(ValueError, match="1 names for 2"):
        store.allocate(["a"], [4096, 4096])
    assert store.allocate(["a", "b"], [4096, 4096]) == [0, 1]
    with pytest.raises(ValueError, match="once"):
        store.allocate(["a"], [4096])
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.read(0, memory(4096))


def test_a_store_of_nothing(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    assert store.allocate([], []) == []
    store.close()


def test_more_than_the_budget_is_refused_before_a_file_is_made(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, limit_bytes=10_000_000)
    with pytest.raises(StoreError, match=r"10\.1 MB are needed, the budget allows 10\.0 MB; say disk=DIR:10\.1MB"):
        store.allocate(["a"], [10_002_432])


def test_more_than_the_disk_has_is_refused_with_what_is_free(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    with pytest.raises(StoreError, match=r"4\.51 PB are needed, .*B are free") as caught:
        store.allocate(["a"], [1 << 52])
    assert str(tmp_path) in str(caught.value)


def test_a_disk_that_fills_while_blocks_are_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, at: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    gc.collect()  # files that earlier tests have left
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StoreError, match=r"1\.05 MB are needed.*No space left on device"):
        DiskStore(tmp_path).allocate(["a"], [1 << 20])
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="absent: no file can be made there: No such file"):
        DiskStore(tmp_path / "absent").allocate(["a"], [4096])


def test_the_file_has_no_name_and_all_its_blocks(store: DiskStore) -> None:
    assert list(store.folder.iterdir()) == []
    assert store._parts is not None
    found = os.fstat(store._parts.file._fd)
    assert found.st_size == sum(SIZES)
    assert found.st_blocks * 512 >= sum(SIZES)


def test_memory_posing_as_a_disk_is_told() -> None:
    """Linux 6.6 and later take O_DIRECT on tmpfs, and ignore it."""
    folder = Path("/dev/shm")
    if not folder.is_dir() or _file_system(os.open(folder, os.O_RDONLY)) != "tmpfs":
        pytest.skip("no tmpfs here")
    store = DiskStore(folder)
    store.allocate(NAMES, SIZES)
    assert not store.direct
    assert "tmpfs is memory, not a disk" in store.note
    store.write(0, memory(SIZES[0], 1)).wait()
    assert torch.equal(read(store, 0), memory(SIZES[0], 1))
    store.close()


def test_a_file_system_that_takes_the_flag_and_refuses_the_transfer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, buffers: Any, at: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse)
        store = DiskStore(tmp_path)
        store.allocate(NAMES, SIZES)
    assert not store.direct
    assert str(tmp_path) in store.note
    store.write(0, memory(SIZES[0], 1)).wait()
    assert torch.equal(read(store, 0), memory(SIZES[0], 1))
    store.close()


def test_homes_outlive_the_store_and_only_they_keep_blocks(store: DiskStore) -> None:
    """A model whose weights are views of homes is its user's after close; the rest of 100 GB is free at once."""
    data = memory(SIZES[2], 7)
    store.write(0, memory(SIZES[0], 6)).wait()
    store.write(2, data).wait()
    home = store.home(2)
    other = raw(store)
    store.close()
    assert torch.equal(home, data)
    used = os.fstat(other).st_blocks * 512
    assert SIZES[2] <= used <= SIZES[2] + 2 * ALIGNMENT
    home[0] += 1
    del home
    gc.collect()
    os.close(other)


UNDER_A_LIMIT = """
import sys, torch
from spu.memory.disk_store import PIECE_BYTES, DiskStore
from spu.memory.slab import Slab
store = DiskStore(sys.argv[1])
regions = store.allocate([f"r{k}" for k in range(16)], [PIECE_BYTES * 2] * 16)
slot = Slab(PIECE_BYTES * 2).view(0, PIECE_BYTES * 2)
for k in regions:
    slot.fill_(k + 1)
    store.write(k, slot).wait()
store.exposed(regions)
for k in regions:
    store.home(k).add_(1)
store.hidden(regions)
for k in regions:
    store.read(k, slot).wait()
    assert int(slot.min()) == int(slot.max()) == k + 2
store.close()
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_DATA and /proc")
def test_a_store_of_four_times_what_the_process_may_have(tmp_path: Path) -> None:
    """256 MB of regions with 64 MB to spare: transfers need a slot and a piece, and homes do not count.

    Three threads have stacks of 8 MB each.
    """
    run = run_limited(UNDER_A_LIMIT, headroom_bytes=64 << 20, arguments=[str(tmp_path)])
    assert (run.code, run.output) == (0, "done\n"), run.errors
