"""The same work on several devices at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from spu.devices.manager import Device, call_pinned

__all__ = ["side_by_side"]


def side_by_side(devices: Sequence[Device], body: Callable[[Device, Callable[[], Any]], Any]) -> list[Any]:
    """``body(device, start)`` in a thread pinned to each device; ``start()`` waits until all have got there.

    Devices of one host share its memory: a core that works alone is faster than the same core while others work too.
    """
    barrier = threading.Barrier(len(devices))
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def one(index: int, device: Device) -> None:
        try:
            results[index] = call_pinned(device, lambda: body(device, barrier.wait))
        except BaseException as error:
            barrier.abort()
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(devices))]
