"""Slabs: exact sizes, real release, page-locking in steps."""

from __future__ import annotations

import gc
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spu.memory import slab as slabs
from spu.memory.mapped import Mapped
from spu.memory.slab import Pinning, Slab, aligned, cuda_pinning, grouped
from spu.memory.store import ALIGNMENT, StoreError

MB = 1 << 20


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    pytest.skip(f"this system does not tell {field}")


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 10 * MB + 1])
def test_a_slab_has_the_asked_size_to_a_page_and_is_zeros(size: int) -> None:
    slab = Slab(size)
    assert slab.size == aligned(size) == -(-size // ALIGNMENT) * ALIGNMENT
    whole = slab.view(0, slab.size)
    assert whole.dtype == torch.uint8
    assert whole.data_ptr() % ALIGNMENT == 0
    assert not whole.any()
    assert (slab.pinned_bytes, slab.note) == (0, "")
    slab.close()
    slab.close()


def test_an_empty_slab() -> None:
    slab = Slab(0)
    assert slab.view(0, 0).numel() == 0
    assert [slot.numel() for slot in slab.slots([0, 0])] == [0, 0]
    slab.close()


def test_it_counts_as_private_data_while_it_is_there_and_not_after() -> None:
    """So that a limit on a process's data (RLIMIT_DATA) means it."""
    gc.collect()
    data, resident = status("VmData"), status("RssAnon")
    slab = Slab(64 * MB)
    assert status("VmData") - data == 64 * MB
    slab.view(0, slab.size).fill_(1)
    assert status("RssAnon") - resident > 60 * MB
    slab.close()
    assert status("VmData") - data == 0
    assert status("RssAnon") - resident < 4 * MB


def test_closing_frees_the_pages_also_under_a_tensor_which_sees_zeros() -> None:
    slab = Slab(64 * MB)
    view = slab.view(0, 64 * MB)
    view.fill_(7)
    before = status("RssAnon")
    slab.close()
    assert before - status("RssAnon") > 60 * MB
    assert not view[: 8 * ALIGNMENT].any()
    with pytest.raises(ValueError, match="closed"):
        slab.view(0, 1)


def test_closing_can_leave_the_viewed_parts_to_their_tensors() -> None:
    slab = Slab(48 * MB)
    slab.view(0, 48 * MB).fill_(7)
    middle = slab.view(16 * MB, 16 * MB)[5:-5]  # a view of the view
    before = status("RssAnon")
    slab.close(keep_viewed=True)
    assert 30 * MB < before - status("RssAnon") < 36 * MB
    assert bool((middle == 7).all())
    before = status("VmData")
    del middle
    assert before - status("VmData") == 48 * MB


def test_a_views_storage_is_its_part_alone() -> None:
    """torch.save writes whole storages: a checkpoint of one tensor must not hold the slab."""
    slab = Slab(10 * ALIGNMENT)
    assert slab.view(ALIGNMENT, 100).untyped_storage().nbytes() == 100
    slab.close()


def test_slots_are_aligned_and_do_not_overlap() -> None:
    sizes = [1, 5000, 0, 4096]
    slab = Slab(sum(map(aligned, sizes)))
    slots = slab.slots(sizes)
    assert [slot.numel() for slot in slots] == sizes
    for k, slot in enumerate(slots):
        assert slot.numel() == 0 or slot.data_ptr() % ALIGNMENT == 0
        slot.fill_(k + 1)
    assert all(bool((slot == k + 1).all()) for k, slot in enumerate(slots))
    with pytest.raises(ValueError, match="20480 bytes in a slab of 16384"):
        slab.slots([*sizes, 1])
    slab.close()


@pytest.mark.parametrize(("start", "size"), [(-1, 4), (0, 4097), (4096, 1), (8192, 0)])
def test_a_view_outside_is_refused(start: int, size: int) -> None:
    slab = Slab(4096)
    with pytest.raises(ValueError, match="do not lie in"):
        slab.view(start, size)
    slab.close()


def test_what_the_system_does_not_give_is_a_store_error() -> None:
    with pytest.raises(StoreError, match=r"does not give 9\.2\d EB|does not give 9\d\d\d PB"):
        Slab((1 << 63) - 8192)
    with pytest.raises(ValueError, match="-1 bytes"):
        Slab(-1)


def test_neighbours_are_grouped_and_never_cut() -> None:
    assert grouped([3, 3, 3, 20, 1, 1], step=6) == [6, 23, 2]
    assert grouped([], step=6) == []
    assert sum(grouped(list(range(50)), step=37)) == sum(range(50))


class Driver:
    """A driver that page-locks up to a limit."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, dict[int, int]()

    def register(self, address: int, size: int) -> str:
        if sum(self.held.values()) + size > self.limit:
            return "out of memory"
        self.held[address] = size
        return ""

    @property
    def pinning(self) -> Pinning:
        return Pinning(self.register, lambda address: self.held.pop(address) and None)


def test_page_locking_at_exact_size_and_back() -> None:
    driver = Driver(10 * MB)
    slab = Slab(3 * MB + 1, driver.pinning)
    assert list(driver.held.values()) == [3 * MB + ALIGNMENT]
    assert list(driver.held) == [slab.view(0, 1).data_ptr()]
    assert slab.pinned_bytes == slab.size
    assert slab.note == ""
    slab.close()
    assert driver.held == {}


def test_where_page_locking_stops_the_rest_is_pageable_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SPARE_BYTES", MB)
    driver = Driver(5 * MB)
    slab = Slab(8 * MB, driver.pinning, [2 * MB, 2 * MB, 2 * MB, 2 * MB])
    assert slab.pinned_bytes == 4 * MB
    assert "4.19 MB of 8.39 MB" in slab.note
    assert "out of memory" in slab.note
    assert slab.is_pinned(2 * MB, 2 * MB)
    assert not slab.is_pinned(3 * MB, 2 * MB)
    assert not slab.is_pinned(0, 0)
    slab.view(0, 8 * MB).fill_(1)
    slab.close()
    assert driver.held == {}


@pytest.mark.parametrize(("limit", "kept"), [(4 * MB + MB // 2, 2 * MB), (MB, 0)])
def test_where_page_locking_stops_small_buffers_can_still_be_page_locked(
    limit: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store took all that the system allowed, and the training stopped at the next batch."""
    monkeypatch.setattr(slabs, "SPARE_BYTES", MB)
    driver = Driver(limit)
    slab = Slab(8 * MB, driver.pinning, [2 * MB, 2 * MB, 2 * MB, 2 * MB])
    assert (slab.pinned_bytes, slab.is_pinned(0, 2 * MB)) == (kept, kept > 0)
    assert "8.39 MB are page-locked" in slab.note
    small = Slab(MB, driver.pinning)
    assert small.note == ""
    slab.close()
    small.close()
    assert driver.held == {}


def test_steps_that_are_not_the_slab_are_refused() -> None:
    with pytest.raises(ValueError, match="steps of 4096 bytes for a slab of 8192"):
        Slab(8192, Driver(MB).pinning, [4096])


def test_a_forgotten_slab_is_given_back() -> None:
    driver = Driver(MB)
    slab = Slab(MB, driver.pinning)
    view = slab.view(0, 8)
    view.fill_(3)
    del slab
    assert driver.held == {}
    assert view.tolist() == [3] * 8


def test_unused_parts_are_those_between_the_views() -> None:
    import mmap

    mapped = Mapped(mmap.mmap(-1, 10 * ALIGNMENT))
    a, b = mapped.view(ALIGNMENT, ALIGNMENT), mapped.view(4 * ALIGNMENT, 2 * ALIGNMENT)
    gone = mapped.view(8 * ALIGNMENT, ALIGNMENT)
    a, b = a[5:-5], b[5:-5]  # what counts is the storage
    del gone
    free = [(start // ALIGNMENT, size // ALIGNMENT) for start, size in mapped.unused()]
    assert free == [(0, 1), (2, 2), (6, 4)]
    assert mapped.view(ALIGNMENT, ALIGNMENT).data_ptr() == a.data_ptr() - 5
    del a, b
    assert list(mapped.unused()) == [(0, 10 * ALIGNMENT)]


def is_left_out_of_forks(address: int) -> bool:
    """Of the mapping with this address, what /proc/self/smaps says of forks: "dc", do not copy."""
    found, smaps = "", Path("/proc/self/smaps")
    for line in smaps.read_text().splitlines() if smaps.exists() else ():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = "here" if int(bounds[1], 16) <= address < int(bounds[2], 16) else ""
        elif found and line.startswith("VmFlags:"):
            return "dc" in line.split()
    pytest.skip("this system does not tell what it does with mappings")


def test_page_locked_memory_is_not_copied_into_forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a loader's workers got a copy of all of it, which the machine had no room for."""
    locked: list[int] = []
    monkeypatch.setattr(slabs, "SPARE_BYTES", 1)
    pinning = Pinning(
        lambda address, size: "" if (len(locked) < 2 or size == 1) and not locked.append(address) else "full",
        locked.remove,
    )
    slab = Slab(3 * MB, pinning, [MB, MB, MB])
    kept = slab.view(MB, MB).fill_(7)
    at = kept.data_ptr()
    assert [is_left_out_of_forks(at + offset) for offset in (-MB, 0, MB)] == [True, True, False]
    if (child := os.fork()) == 0:
        slab.close()
        os._exit(len(locked))  # what the parent has locked stays so
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    slab.close(keep_viewed=True)
    assert (locked, bool((kept == 7).all())) == ([], True)
    assert not is_left_out_of_forks(at)


def test_advice_is_for_whole_pages_and_may_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system with pages of 64 KB refuses it from within one, and the slab was not made."""
    page, given = 1 << 16, set[int]()

    def advise(self: Mapped, advice: int, start: int, size: int) -> None:
        given.add(start)
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(Mapped, "advise", advise)
    monkeypatch.setattr(mmap, "PAGESIZE", page)
    slab = Slab(
        3 * page, Pinning(lambda address, size: "", lambda address: None), [page + ALIGNMENT, 2 * page - ALIGNMENT]
    )
    assert slab.pinned_bytes == slab.size
    slab.close()
    assert given == {0, page}


def test_memory_is_page_locked_for_all_cards_by_the_one_that_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered without a flag it was pageable to every card but the current one, which need not be in use at all."""
    asked: list[tuple[str, int, int]] = []
    current = [0]

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    driver = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: asked.append(("lock", flags, current[0])) or 0,
        cudaHostUnregister=lambda address: asked.append(("unlock", 1, current[0])),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", on)
    slab = Slab(2 * MB, cuda_pinning(torch.device("cuda:1")))
    assert slab.pinned_bytes == 2 * MB
    slab.close()
    portable = 1  # cudaHostRegisterPortable
    assert asked == [("lock", portable, 1), ("unlock", portable, 1)]
