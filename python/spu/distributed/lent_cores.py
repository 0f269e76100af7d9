"""Processes of one machine that lend one another their cores while they wait.

Stages of a pipeline wait for a good part of each step, for the schedule's bubble and for slower neighbours. Within one
process a stage that waits helps the others with their products (`spu.engine.channel`); between processes nobody sees
another one's tensors, so what crosses is the core: each process has a thread bound to each core of the others, which
takes pieces of its own process's products while that core's owner waits (csrc/cpu/borrow.cpp). Results are the same
bit for bit, and a process that dies with a core leaves nothing but a word in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from spu.devices.host import one_of_each_core
from spu.distributed.shared_memory import shared_places
from spu.engine.channel import helping_kernels

__all__ = ["LentCores", "lent_cores"]


class LentCores:
    """As a context: this process waits, and the others may have its cores.

    Args:
        kernels: ``spu._C``.
        places: each process's words, as `spu.distributed.shared_memory.shared_places` gives them.
        cores: each process's.
        rank: of this process.
    """

    def __init__(self, kernels: Any, places: Sequence[torch.Tensor], cores: Sequence[Sequence[int]], rank: int) -> None:
        self._kernels, self._own = kernels, (places[rank].data_ptr(), len(cores[rank]))
        _KEPT.extend(places)
        for other, (place, numbers) in enumerate(zip(places, cores, strict=True)):
            for index, core in enumerate(numbers):
                if other != rank:
                    kernels.borrow_core(place.data_ptr() + index * 4, core)

    def __enter__(self) -> None:
        self._kernels.lend_cores(*self._own)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._kernels.take_cores_back(*self._own)

    def close(self) -> None:
        """End the threads on the others' cores; harmless when called twice."""
        self._kernels.borrow_no_more()


_KEPT: list[torch.Tensor] = []
"""Memory that a product of another thread may look into while a training is closed: some bytes for each training."""


def lent_cores(group: dist.ProcessGroup, cores: Sequence[Sequence[int]]) -> LentCores | None:
    """Return the context; called in each process of the group.

    Args:
        group: processes of one machine.
        cores: each one's, by rank; of hyperthreads one is lent.

    Returns:
        None where the kernels are not there, or memory cannot be shared.
    """
    kernels = helping_kernels()
    cores = [one_of_each_core(own) for own in cores]
    places = shared_places(group, 4 * max(map(len, cores)), willing=kernels is not None)
    if kernels is None or places is None:
        return None
    return LentCores(kernels, places, cores, group.rank())
