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
    """CUDA graphs in a memory pool of their own, captured on a side stream, replayed on the current one.

    Args:
        device: the card.
        stream: the side stream; default: a new one. torch keeps workspaces of cuBLAS and cuBLASLt, 8 to 32 MiB each,
            for every thread and stream that has multiplied, also when the graph is gone: give all captures one stream.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._stream = torch.cuda.Stream(device) if stream is None else stream
        self._pool = torch.cuda.graph_pool_handle()

    @staticmethod
    def maker(device: torch.device) -> Callable[[], CudaCapture]:
        """Return what makes captures on a card, all in one stream."""
        made: list[torch.cuda.Stream] = []

        def make() -> CudaCapture:
            if not made:
                made.append(torch.cuda.Stream(device))
            return CudaCapture(device, made[0])

        return make

    def record(self, work: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with capturing(graph, self._stream, self._pool):
            work()
        return graph.replay
