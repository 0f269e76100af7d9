"""Regions that come to a device: order, updates by the host, small buffers, failures."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checked_streams import CheckedStreams, watched
from torch import Tensor

from spu.memory.chunks import Chunks
from spu.memory.device_store import DeviceStore, HostUpdate, Part, Staging
from spu.memory.disk_store import DiskStore
from spu.memory.host_store import HostStore
from spu.memory.residency import Visit
from spu.memory.slab import Slab
from spu.memory.store import Store, StoreError
from spu.memory.streamed import Streamed
from spu.memory.streams import HostStreams, Streams, streams_for
from spu.memory.unit import Unit, allocated, piece

SIZE = 3 * 4096


def opened(kind: str, folder: Path, streams: Streams, buffers: int = 1) -> DeviceStore:
    if kind == "host":
        return DeviceStore(HostStore(), streams)
    memory = Slab((2 + buffers) * 4 * SIZE).slots([4 * SIZE] * (2 + buffers))
    return DeviceStore(DiskStore(folder), streams, staging=Staging(memory[:2], memory[2:]))


@pytest.fixture(params=["host", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DeviceStore]:
    made = opened(request.param, tmp_path, HostStreams())
    yield made
    made.close()


def filled(value: int, size: int = SIZE) -> Tensor:
    return Slab(size).slots([size])[0].fill_(value)


def test_what_is_written_is_read(store: DeviceStore) -> None:
    one, two = store.allocate(["one", "two"], [SIZE, SIZE])
    store.write(one, filled(7)).wait()
    into = filled(0)
    store.read(one, into).wait()
    assert into.eq(7).all()
    store.read(two, into).wait()
    assert into.eq(0).all()


def test_an_update_runs_between_the_writes_before_it_and_the_copies_after_it(store: DeviceStore) -> None:
    weights, grads, state = store.allocate(["weights", "gradients", "state"], [SIZE] * 3)
    into, names = filled(0), list[str]()

    def run(memory: Mapping[int, Tensor]) -> bool:
        names.append(threading.current_thread().name)
        memory[weights].add_(memory[grads])
        memory[state].add_(1)
        return True

    update = HostUpdate([Part(grads, SIZE, None), Part(state, SIZE, None)], run, [state, weights])
    for step in range(1, 4):
        store.write(grads, filled(step))
        store.bring(step, [Part(weights, SIZE, into)], update).wait()
    assert into.eq(6).all()
    assert len(set(names)) == 1
    assert names[0] != threading.current_thread().name
    store.exposed([weights, state])
    assert store.home(weights).eq(6).all()
    assert store.home(state).eq(3).all()


def test_an_update_that_changes_nothing_writes_nothing(tmp_path: Path) -> None:
    store = opened("disk", tmp_path, HostStreams())
    (region,) = store.allocate(["weights"], [SIZE])

    def run(memory: Mapping[int, Tensor]) -> bool:
        memory[region].fill_(9)
        return False

    store.bring(0, [Part(region, SIZE, None)], HostUpdate([], run, [region])).wait()
    into = filled(1)
    store.read(region, into).wait()
    assert into.eq(0).all()
    store.close()


def test_an_update_that_raises_tells_its_ticket_alone(store: DeviceStore) -> None:
    (region,) = store.allocate(["weights"], [SIZE])

    def run(memory: Mapping[int, Tensor]) -> bool:
        raise ArithmeticError("no such update")

    ticket = store.bring(0, [Part(region, SIZE, filled(0))], HostUpdate([], run, [region]))
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="no such update"):
            ticket.wait()
    into = filled(1)
    store.read(region, into).wait()
    assert into.eq(0).all()
    store.exposed([region])


def test_a_closed_store_says_so(store: DeviceStore) -> None:
    (region,) = store.allocate(["weights"], [SIZE])
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.read(region, filled(0))
    assert not any(t.name.startswith("spu below") for t in threading.enumerate())


def test_a_disk_needs_memory_between(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DiskStore comes to a device through the host"):
        DeviceStore(DiskStore(tmp_path), HostStreams())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_is_told(tmp_path: Path) -> None:
    store = opened("host", tmp_path, HostStreams())
    (region,) = store.allocate(["weights"], [SIZE])
    child = os.fork()
    if not child:
        try:
            store.read(region, filled(0))
        except StoreError as error:
            os._exit(0 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    store.close()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3 * 4096, 5 * 4096 + 7])
def test_chunks_carry_every_byte(size: int) -> None:
    streams = CheckedStreams()
    buffers, device = Slab(8192).slots([4096] * 2), torch.zeros(size, dtype=torch.uint8)
    streams.device = [device]
    source = torch.randint(0, 256, (size,), dtype=torch.uint8)
    chunks = Chunks(streams, buffers)
    for _ in range(2):  # the buffers are still in use by the first
        streams.hold(chunks.inward(device, source, [streams.mark()]))
        assert torch.equal(device, source)
        source = source + 1
    back = torch.zeros_like(source)
    chunks.outward(back, device, [streams.mark()])
    assert torch.equal(back, device)
    assert not streams.errors


class Adds:
    """Work whose update adds the gradients to the weights, and whose backward makes ones."""

    def __init__(self) -> None:
        self.weights: dict[int, Tensor] = {}
        self.state: dict[int, Tensor] = {}
        self.due: set[int] = set()

    def unit(self, index: int, size: int) -> Unit:
        def put(table: dict[int, Tensor]) -> Callable[[Tensor], None]:
            return lambda tensor: table.__setitem__(index, tensor)

        def get(table: dict[int, Tensor]) -> Callable[[], Tensor]:
            return lambda: table[index]

        self.weights[index], self.state[index] = torch.zeros(size), torch.zeros(size)
        entry: Any = ((size,), torch.float32)
        unit = Unit(index)
        unit.trained = piece(f"{index} weights", [(*entry, put(self.weights), get(self.weights))])
        unit.grads = piece(f"{index} gradients", [(*entry, lambda tensor: None, lambda: torch.zeros(size))])
        unit.state = piece(f"{index} state", [(*entry, put(self.state), get(self.state))])
        return unit

    def prepare(self, stage: int) -> None: ...

    def pending(self, stage: int) -> bool:
        return stage in self.due

    def update(self, stage: int, grads: Sequence[Tensor]) -> bool:
        self.weights[stage].add_(grads[0])
        self.state[stage].add_(1)
        self.due.discard(stage)
        return True

    def lend(self, stage: int, grads: Sequence[Tensor]) -> None:
        grads[0].fill_(1)

    def collect(self, stage: int, grads: Sequence[Tensor]) -> None:
        self.due.add(stage)


def streamed(store: DeviceStore, device: str = "cpu") -> tuple[Streamed, Adds]:
    work = Adds()
    below: Store = store.below
    units, _ = allocated({k: work.unit(k, 900 + k) for k in range(4)}, below)
    sizes = [max(u.weight_bytes for u in units.values())] * 2 + [max(u.grad_bytes for u in units.values())]
    memory = Slab(sum(sizes)).slots(sizes)
    memory = memory if device == "cpu" else [m.to(device) for m in memory]
    residency = Streamed(units, store, memory[:2], memory[2:], work)
    for unit in units.values():
        residency.fill(unit)
    return residency, work


def step(residency: Streamed) -> None:
    visits = [Visit(k, False) for k in range(3)] + [Visit(k, True) for k in (3, 2, 1, 0)]
    residency.begin(visits)
    for visit in visits:
        residency.fetch(visit)
        residency.release(visit)
    residency.end()


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_two_hundred_steps_take_no_more_memory_than_twenty(kind: str, tmp_path: Path) -> None:
    streams = CheckedStreams()
    store = opened(kind, tmp_path, streams)
    residency, work = streamed(store)
    watched(residency, streams)
    counts = []
    for index in range(200):
        step(residency)
        if index in (20, 199):
            gc.collect()
            tensors = sum(type(each) is Tensor for each in gc.get_objects())
            counts.append((tensors, threading.active_count(), len(store._last), len(os.listdir("/proc/self/fd"))))
    residency.show()
    (early, *rest), (late, *others) = counts
    assert abs(late - early) < 20  # a copy or two may be in progress
    assert rest == others
    assert all(tensor.eq(200).all() for tensor in work.weights.values())
    assert all(tensor.eq(200).all() for tensor in work.state.values())
    assert not streams.errors, streams.errors[:3]
    residency.close()


class Nowhere(HostStreams):
    """Streams of a device without memory."""

    def copy(self, into: Tensor, source: Tensor, after: Any = ()) -> Any:
        return self.mark()


def test_weights_are_on_the_device_in_a_run_and_on_the_host_between_runs(tmp_path: Path) -> None:
    """A stand-in in a run must be on the device: autograd forgets what it knows of a leaf that changes its device."""
    store = opened("host", tmp_path, Nowhere())
    residency, work = streamed(store, "meta")
    seen: list[set[str]] = []

    def devices() -> set[str]:
        return {tensor.device.type for tensor in work.weights.values()}

    residency.begin([Visit(k, True) for k in range(4)])
    for k in range(4):
        residency.fetch(Visit(k, True))
        seen.append(devices())
        residency.release(Visit(k, True))
        seen.append(devices())
    residency.end()
    assert seen == [{"meta"}] * 8
    assert devices() == {"cpu"}
    assert all(tensor.isnan().all() for tensor in work.weights.values())
    residency.close()


def test_the_streams_of_a_cpu_are_the_calling_thread() -> None:
    assert isinstance(streams_for(torch.device("cpu")), HostStreams)
