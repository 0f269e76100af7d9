"""Copies between a device and its host beside the device's computations, ordered by events."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CudaStreams", "Event", "HostStreams", "Streams", "streams_for"]


class Event(Protocol):
    """A moment in a device's work."""

    def synchronize(self) -> None:
        """Return when it has come: the calling thread waits."""


class Streams(Protocol):
    """Two queues of copies, one for each direction, beside the queue of the device's computations.

    A copy begins when those before it in its queue are done and the events that it was given have come. The thread that
    starts it does not wait.
    """

    def mark(self) -> Event:
        """Return the moment when the computations that were enqueued so far are done."""

    def hold(self, event: Event) -> None:
        """Let computations that are enqueued from now on begin after an event; the calling thread does not wait."""

    def copy(self, into: Tensor, source: Tensor, after: Iterable[Event] = ()) -> Event:
        """Start to copy, one of the two on the device and one in page-locked memory; return when it is done.

        Both must stay as they are, and be kept alive by the caller, until then.
        """


class _Now:
    """A moment that has come."""

    def synchronize(self) -> None:
        return


class HostStreams:
    """The queues of a CPU: each copy is done at once, by the thread that starts it."""

    def mark(self) -> Event:
        """See `Streams.mark`."""
        return _Now()

    def hold(self, event: Event) -> None:
        """See `Streams.hold`."""

    def copy(self, into: Tensor, source: Tensor, after: Iterable[Event] = ()) -> Event:
        """See `Streams.copy`."""
        into.copy_(source)
        return _Now()


class CudaStreams:
    """The streams of a GPU: its current one computes, two of their own copy.

    The two live as long as this object: with new ones in each step, torch's allocator would grow.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inward, self._outward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def mark(self) -> Event:
        """See `Streams.mark`."""
        return self._recorded(torch.cuda.current_stream(self._device))

    def hold(self, event: Event) -> None:
        """See `Streams.hold`."""
        assert isinstance(event, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(event)

    def copy(self, into: Tensor, source: Tensor, after: Iterable[Event] = ()) -> Event:
        """See `Streams.copy`."""
        stream = self._inward if into.is_cuda else self._outward
        # A copy runs in the current stream of the card that it touches, whatever the stream here is.
        assert (into if into.is_cuda else source).device == self._device
        for event in after:
            assert isinstance(event, torch.cuda.Event)
            stream.wait_event(event)
        # The device first: the stream alone would leave the thread's own device current, and with it a context there.
        with torch.cuda.device(self._device), torch.cuda.stream(stream), torch.no_grad():
            into.copy_(source, non_blocking=True)
        return self._recorded(stream)

    @staticmethod
    def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps: the cores update meanwhile
        event.record(stream)
        return event


def streams_for(device: torch.device) -> Streams:
    """Return the streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams()
