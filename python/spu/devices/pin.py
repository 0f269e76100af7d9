"""Threads that work for one device each: bound to its cores, alone or several side by side."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from spu.devices.manager import Device

__all__ = ["call_pinned", "pin_current_thread", "side_by_side"]

T = TypeVar("T")


def pin_current_thread(device: Device) -> None:
    """Bind the calling thread to the device's cores and thread count, or to its GPU."""
    if device.torch_device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(device.torch_device)
    if not device.cores:
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, device.cores)
    # Torch's thread count is per thread, and OpenMP's pool of this thread inherits its affinity.
    torch.set_num_threads(device.threads)


def call_pinned(device: Device, function: Callable[[], T]) -> T:
    """Call ``function()`` in a new thread pinned to ``device``; return its result or raise its exception.

    A thread of its own, since an OpenMP pool keeps the affinity it was created with.
    """
    return side_by_side([device], lambda _, start: function())[0]


def side_by_side(devices: Sequence[Device], body: Callable[[Device, Callable[[], object]], T]) -> list[T]:
    """Call ``body(device, start)`` in a thread pinned to each device; ``start()`` waits until all have called it.

    Devices of one host share its memory: a core that works alone is faster than the same core while others work too.
    """
    barrier = threading.Barrier(len(devices))
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def one(index: int, device: Device) -> None:
        try:
            pin_current_thread(device)
            results[index] = body(device, barrier.wait)
        except BaseException as error:  # handed to the caller, whatever it is
            barrier.abort()
            errors.append(error)

    threads = [threading.Thread(target=one, args=(k, d), name=f"spu-{d.name}") for k, d in enumerate(devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:  # those that waited for the one that failed have broken barriers
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return [results[index] for index in range(len(devices))]
