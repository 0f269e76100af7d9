"""One thread for each device, bound to the device's cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from spu.devices import Device, pin_current_thread

__all__ = ["Worker"]

T = TypeVar("T")


class Worker:
    """A thread that runs one task at a time, with the cores, the thread count and the CUDA device of ``device``."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix=f"spu {device.name}", initializer=pin_current_thread, initargs=(device,)
        )

    def submit(self, task: Callable[..., T], *args: Any) -> Future[T]:
        return self._pool.submit(task, *args)

    def close(self) -> None:
        """Wait for the running task and end the thread; harmless when called twice."""
        self._pool.shutdown(wait=True, cancel_futures=True)
