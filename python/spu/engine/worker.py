"""One thread for each device, bound to the device's cores."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from spu.devices.manager import Device, pin_current_thread

__all__ = ["Worker"]

T = TypeVar("T")


class Worker:
    """A thread that runs one task at a time, with the cores, the thread count and the CUDA device of ``device``.

    A process forked from this one has none of its threads. There, the first task starts one.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._start()

    def submit(self, task: Callable[..., T], *args: Any) -> Future[T]:
        if self._process != os.getpid():
            self._start()
        return self._pool.submit(task, *args)

    def close(self) -> None:
        """Wait for the running task and end the thread; harmless when called twice."""
        if self._process == os.getpid():
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> None:
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix=f"spu {self.device.name}", initializer=pin_current_thread, initargs=(self.device,)
        )
