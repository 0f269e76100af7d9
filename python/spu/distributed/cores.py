"""The cores of a process that is not alone on its machine.

torchrun gives each of several processes one thread (``OMP_NUM_THREADS=1``), whatever the machine has; other launchers
leave each as many as there are cores. Here each gets its share of the cores and is bound to it, as the CPU devices of
one process are. What somebody has chosen stays: see :func:`threads_are_chosen`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from spu.devices.host import machine_name, physical_cores, usable_cores
from spu.devices.manager import Device, DeviceManager
from spu.devices.pin import pin_current_thread

__all__ = ["Share", "Where", "described", "my_turn", "share_of", "threads_are_chosen", "where"]

Where = tuple[str, tuple[int, ...]]
"""A machine's name, and the cores that a process may use there; none if it shares no cores."""


def threads_are_chosen() -> bool:
    """Tell whether somebody has said how many threads this process works with: ``torch.set_num_threads``, or
    ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS`` in the environment, but for the 1 that torchrun puts there itself.
    """
    threads, given = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    if "MKL_NUM_THREADS" in os.environ:
        return True
    if given is not None:
        return not (threads == 1 and given == "1" and "TORCHELASTIC_RUN_ID" in os.environ)
    cores = usable_cores()
    return threads not in (len(cores), physical_cores(cores))


def where(device: Device) -> Where:
    """Return what a process tells the others: where it runs, with which cores."""
    shares = device.torch_device.type == "cpu" and not threads_are_chosen()
    return machine_name(), tuple(sorted(usable_cores())) if shares else ()


def described(cores: str, budget: str) -> str:
    """Return one description of a device of two: what it is from the first, its budget from the second."""
    return f"{cores.partition('; ')[0]}; {budget.partition('; ')[2]}"


def my_turn(everyones: Sequence[Where], rank: int) -> tuple[int, int]:
    """Return this process's number among those that may use the same cores of one machine, and how many they are."""
    same = [other for other, place in enumerate(everyones) if place == everyones[rank]]
    return same.index(rank), len(same)


def share_of(everyones: Sequence[Where], rank: int) -> Share | None:
    """Return this process's share of the cores; None where it shares none, or has them for itself."""
    turn, count = my_turn(everyones, rank)
    if count == 1 or not everyones[rank][1]:
        return None
    every = DeviceManager().get_devices(["cpu"] * count)
    alone = count <= len(everyones[rank][1])
    return Share(every[turn], alone=alone, of_all=[device.cores for device in every] if count == len(everyones) else ())


class Share:
    """The calling thread, bound to its cores until :meth:`give_back`.

    Args:
        device: has the cores and the number of torch's threads.
        alone: no other process has these cores; else it is not bound to them: the system moves processes about.
        of_all: each process's cores, by rank, where all are on this machine and share its cores.

    Attributes:
        of_all: the same; empty where processes are not alone on their cores.
    """

    def __init__(self, device: Device, *, alone: bool, of_all: Sequence[tuple[int, ...]] = ()) -> None:
        self.of_all = of_all if alone else ()
        self.cores, self.threads, self._which = device.cores if alone else (), device.threads, device.description
        self._given_back = False
        self._threads_before = torch.get_num_threads()
        self._cores_before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
        if alone:
            pin_current_thread(device)
        torch.set_num_threads(self.threads)

    def of(self, device: Device) -> Device:
        """Return the process's device with these cores alone."""
        description = described(self._which, device.description)
        return replace(device, cores=self.cores, threads=self.threads, description=description)

    def give_back(self) -> None:
        """Undo it where it still holds; harmless when called twice."""
        if self._given_back:
            return
        self._given_back = True
        if torch.get_num_threads() == self.threads:
            torch.set_num_threads(self._threads_before)
        if self.cores and self._cores_before and os.sched_getaffinity(0) == set(self.cores):
            os.sched_setaffinity(0, self._cores_before)
