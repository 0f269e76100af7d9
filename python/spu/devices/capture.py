"""Work that is recorded once and done again: by CUDA graphs on a card, by calling it on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from spu.common.capturing import capturing

__all__ = ["Called", "Capture", "CudaCapture"]


class Capture(Protocol):
    """Records work, and does it again. One for each kind of microbatch; its pieces are replayed in their order."""

    def record(self, work: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
        """Return what does the work again, with the generators' states of then.

        Raises:
            RuntimeError: the work cannot be captured.
        """


class Called:
    """The form of CPUs: work is done again by calling it."""

    def record(self, work: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
        return work


class CudaCapture:
    """CUDA graphs in a memory pool of their own, captured on a side stream, replayed on the current one."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with capturing(graph, self._stream, self._pool):
            work()
        return graph.replay
