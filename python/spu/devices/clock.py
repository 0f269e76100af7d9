"""When work on a device began and ended, without a wait of the host for it.

A CPU's work is timed by the host's clock. A card works later than the host asks it to: there a mark is an event in the
card's stream, and its time is read when somebody wants to know it, usually after the step. The card's times are put on
the host's scale by one more event, of which both clocks tell the time, at the reading.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Elapsed", "Mark", "Reading", "mark"]

Mark = float | torch.cuda.Event
"""A moment: seconds of ``time.perf_counter``, or an event that a card reaches."""


def mark(device: torch.device) -> Mark:
    """Return a mark of now on a CPU, and of the end of all work handed to a card so far.

    On a card it lies in the default stream, which every worker thread uses.
    """
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.default_stream(device))
    return event


class Reading:
    """Reads marks, all on the host's scale. Waits for the cards to reach them."""

    def __init__(self) -> None:
        self._origins: dict[torch.device, tuple[float, torch.cuda.Event]] = {}

    def seconds(self, moment: Mark, device: torch.device) -> float:
        """Return a mark's time in seconds of ``time.perf_counter``."""
        if isinstance(moment, float):
            return moment
        if device not in self._origins:
            now = mark(device)
            assert not isinstance(now, float)
            now.synchronize()
            # Times of one card count from its first mark here: the fp32 milliseconds between two events are then few.
            self._origins[device] = time.perf_counter() - moment.elapsed_time(now) / 1e3, moment
        at, origin = self._origins[device]
        return at + origin.elapsed_time(moment) / 1e3


@dataclass(frozen=True)
class Elapsed:
    """What several devices did between two moments.

    Attributes:
        devices: as torch names them.
        begin: a mark of each device, before; likewise end, after.
    """

    devices: Sequence[torch.device]
    begin: Sequence[Mark]
    end: Sequence[Mark]

    @property
    def seconds(self) -> float:
        """Seconds from when all devices were free for this work until all had done it; waits for cards."""
        reading = Reading()
        begins = [reading.seconds(moment, device) for moment, device in zip(self.begin, self.devices, strict=True)]
        ends = [reading.seconds(moment, device) for moment, device in zip(self.end, self.devices, strict=True)]
        return max(ends) - max(begins)
