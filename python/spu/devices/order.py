"""The order between the thread that calls a trainer and the threads that work for it, on cards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["in_callers_order"]


@contextmanager
def in_callers_order(devices: Iterable[torch.device]) -> Iterator[None]:
    """Let what other threads hand to cards inside begin after what this thread has handed to them, and end before what
    it hands to them afterwards.

    A card's default stream is one for all threads. A caller in another one (``with torch.cuda.stream(...)``) would not
    be ordered with the workers, which use the default stream: they would read inputs that are not there yet. Nothing
    waits on the host.
    """
    pairs = [(torch.cuda.current_stream(card), torch.cuda.default_stream(card)) for card in set(devices)]
    apart = [(own, default) for own, default in pairs if own != default]
    for own, default in apart:
        default.wait_stream(own)
    try:
        yield
    finally:
        for own, default in apart:
            own.wait_stream(default)
