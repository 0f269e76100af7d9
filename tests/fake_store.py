"""A store in memory whose reads and writes run in a thread, for tests: it holds its callers to the protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from spu.memory.store import ALIGNMENT, StoreError


class FakeTicket:
    def __init__(self, store: FakeStore, region: int, future: Future[None]) -> None:
        self.store, self.region, self.future = store, region, future

    def wait(self) -> None:
        try:
            self.future.result()
        finally:
            self.store.busy.discard(self.region)


class FakeStore:
    """Regions in memory.

    Args:
        seconds: that each read or write takes.
        fail: given "read" or "write" and how many there were before, whether this one fails.
    """

    def __init__(self, seconds: float = 0.0, fail: Callable[[str, int], bool] = lambda kind, count: False) -> None:
        self.regions: list[torch.Tensor] = []
        self.busy: set[int] = set()
        self.counts = {"read": 0, "write": 0}
        self.bytes = {"read": 0, "write": 0}
        self.seconds, self.fail = seconds, fail
        self.pool = ThreadPoolExecutor(2)

    def allocate(self, names: Sequence[str], sizes: Sequence[int]) -> list[int]:
        assert not self.regions, "allocated twice"
        assert len(names) == len(sizes)
        assert all(size % ALIGNMENT == 0 for size in sizes)
        self.regions = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        return list(range(len(sizes)))

    def read(self, region: int, into: torch.Tensor) -> FakeTicket:
        return self._start("read", region, into)

    def write(self, region: int, data: torch.Tensor) -> FakeTicket:
        return self._start("write", region, data)

    def _start(self, kind: str, region: int, memory: torch.Tensor) -> FakeTicket:
        assert region not in self.busy, "a read or write of this region is in progress"
        assert memory.dtype == torch.uint8
        assert memory.is_contiguous()
        assert memory.data_ptr() % ALIGNMENT == 0
        assert len(memory) % ALIGNMENT == 0
        self.busy.add(region)
        fails = self.fail(kind, self.counts[kind])
        self.counts[kind] += 1
        self.bytes[kind] += len(memory)

        def copy() -> None:
            time.sleep(self.seconds)
            if fails:
                raise StoreError(f"{kind} of region {region}: no space left on the fake device")
            own = self.regions[region][: len(memory)]
            if kind == "read":
                memory.copy_(own)
            else:
                own.copy_(memory)

        return FakeTicket(self, region, self.pool.submit(copy))

    def home(self, region: int) -> torch.Tensor:
        return self.regions[region]

    def exposed(self, regions: Sequence[int]) -> None:
        """Nothing: no checksums."""

    def hidden(self, regions: Sequence[int]) -> None:
        """Nothing: no checksums."""

    def close(self) -> None:
        self.pool.shutdown(wait=True)
