"""Capturing a CUDA graph, with nothing left behind where that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from spu.common import torch_private

__all__ = ["capturing"]


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> Iterator[None]:
    """Capture in a stream what the block does. Other threads may allocate and synchronise meanwhile.

    Where the capture is spoilt, torch (2.11 to 2.13) fails to end it, and leaves three things: this thread in the
    stream, where no other thread's work is ordered with what it does next; the allocator in the capture, in which it
    takes back no memory that other streams have used; and the pool without an owner. All are put right here.
    """
    device = stream.device
    try:
        with torch.cuda.stream(stream), torch.cuda.graph(graph, pool, stream, "thread_local"):
            yield
    except BaseException:  # whatever a model's code raises
        with suppress(RuntimeError):  # torch has ended it
            torch_private.end_pool(device.index, pool)
        torch.cuda.synchronize(device)  # raises once more if the context is lost
        raise
