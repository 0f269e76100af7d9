"""For tests without a GPU: a thread of the host packs and copies beside the stages, as a side stream of a GPU does."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


class HostTicket:
    def __init__(self, future: Future[Any]) -> None:
        self.future = future

    def arrive(self, target: torch.device) -> Any:
        return self.future.result()


class HostSide:
    def __init__(self, *_: torch.device) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="spu link")

    def start(self, task: Callable[[], Any], given: Any) -> HostTicket:
        return HostTicket(self.pool.submit(task))

    def settle(self) -> None: ...

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
