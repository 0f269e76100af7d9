"""A store in the host's memory: the slab is the home, and copies run in the background."""

from __future__ import annotations

import gc

import pytest
import torch

from spu.memory import host_store
from spu.memory.host_store import HostStore
from spu.memory.slab import Pinning, Slab
from spu.memory.store import ALIGNMENT, StoreError

SIZES = [5 * ALIGNMENT, ALIGNMENT, 0, 3 * ALIGNMENT]
NAMES = [f"stage {k} weights" for k in range(len(SIZES))]


def memory(size: int, seed: int) -> torch.Tensor:
    return Slab(size).view(0, size).random_(0, 256, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_store, "PIECE_BYTES", 2 * ALIGNMENT)
    made = HostStore()
    assert made.allocate(NAMES, SIZES) == [0, 1, 2, 3]
    yield made
    made.close()


def test_what_was_written_is_read_and_is_at_home(store: HostStore) -> None:
    assert not store.home(0).any()
    written = [memory(size, seed) for seed, size in enumerate(SIZES)]
    for ticket in [store.write(region, data) for region, data in enumerate(written)]:
        ticket.wait()
    for region, data in enumerate(written):
        into = memory(SIZES[region], 77)
        store.read(region, into).wait()
        assert torch.equal(into, data)
        assert torch.equal(store.home(region), data)


def test_a_change_at_home_is_read(store: HostStore) -> None:
    store.exposed([3])
    store.home(3)[5] = 9
    store.hidden([3])
    into = memory(SIZES[3], 0)
    store.read(3, into).wait()
    assert into.nonzero().tolist() == [[5]]


def test_the_first_bytes_of_a_region(store: HostStore) -> None:
    data = memory(3 * ALIGNMENT, 1)
    store.write(0, data).wait()
    assert torch.equal(store.home(0)[: 3 * ALIGNMENT], data)
    assert not store.home(0)[3 * ALIGNMENT :].any()
    assert not store.home(1).any()


def test_memory_that_does_not_fit_is_refused(store: HostStore) -> None:
    for call in (store.read, store.write):
        with pytest.raises(ValueError, match="has 4096 bytes, the tensor has 8192"):
            call(1, memory(2 * ALIGNMENT, 0))
        with pytest.raises(ValueError, match="aligned"):
            call(0, memory(2 * ALIGNMENT, 0)[8 : 8 + ALIGNMENT])


def test_homes_outlive_the_store() -> None:
    store = HostStore()
    store.allocate(NAMES, SIZES)
    data = memory(SIZES[0], 3)
    ticket = store.write(0, data)
    home, other = store.home(0), store.home(3)
    other.fill_(1)
    del other
    store.close()
    store.close()
    ticket.wait()
    assert torch.equal(home, data)
    with pytest.raises(StoreError, match="closed"):
        store.home(0)
    del home
    gc.collect()


def test_more_than_the_budget_is_refused() -> None:
    with pytest.raises(StoreError, match="36864 bytes are needed, 36863 are allowed"):
        HostStore(limit_bytes=sum(SIZES) - 1).allocate(NAMES, SIZES)
    store = HostStore(limit_bytes=sum(SIZES))
    with pytest.raises(StoreError, match="allocate regions first"):
        store.home(0)
    store.allocate(NAMES, SIZES)
    with pytest.raises(ValueError, match="once"):
        store.allocate(NAMES, SIZES)
    store.close()


def test_page_locked_in_steps_of_whole_regions_as_far_as_the_driver_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spu.memory.slab.STEP_BYTES", 1)
    monkeypatch.setattr("spu.memory.slab.SPARE_BYTES", 1)
    held: dict[int, int] = {}

    def register(address: int, size: int) -> str:
        if len(held) == 2 and size > 1:
            return "no more"
        held[address] = size
        return ""

    store = HostStore(Pinning(register, lambda address: held.pop(address) and None))
    store.allocate(NAMES, SIZES)
    assert list(held.values()) == SIZES[:2]
    assert store.pinned_bytes == sum(SIZES[:2])
    assert [store.is_pinned(k) for k in range(4)] == [True, True, False, False]
    assert "no more" in store.note
    store.close()
    assert held == {}
