"""How long a call takes on a GPU, and how long when Python makes it.

A small kernel ends before the host has launched the next one: events around a loop of calls then tell the time of
Python. So the calls are captured once as a CUDA graph, which the device runs by itself, and the graph is timed. What a
call takes with its launch is told apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from spu.common.capturing import capturing

__all__ = ["Cuda", "Queue", "Timing", "context_is_gone", "measure_us", "time_call"]

_WARM_UP, _ROUNDS, _ROUND_SECONDS = 3, 5, 0.02
_CAPTURED, _LEAST_CAPTURED = 20, 10  # calls in a graph: of a short call and of a long one
_LONG_SECONDS = 1e-3


class Timing(NamedTuple):
    """The time of a call.

    Attributes:
        device_us: microseconds of the device, without the host where it could be captured.
        eager_us: microseconds of a call after the other as Python makes them; the larger of host and device.
        captured: device_us comes from a graph; otherwise it is eager_us.
    """

    device_us: float
    eager_us: float
    captured: bool


class Queue(Protocol):
    """A device that does what it is handed in order."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Run it and return the device's seconds from begin to end."""

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """Record what it hands to the device, which is not done now; return what does it again.

        Raises:
            RuntimeError: it does something that cannot be recorded.
        """


class Cuda:
    """A stream of a GPU, on which calls are also captured: what they keep for each stream is there by then."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def seconds(self, run: Callable[[], object]) -> float:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), capturing(graph, self._stream, torch.cuda.graph_pool_handle()):
            run()
        return graph.replay


def time_call(function: Callable[[], object], queue: Queue) -> Timing:
    """Time a call after a warm-up: medians over rounds."""

    def calls(count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                function()

        return run

    queue.seconds(calls(_WARM_UP))
    once = max(queue.seconds(function), 1e-7)
    count = max(1, min(1000, int(_ROUND_SECONDS / once)))
    eager = statistics.median(queue.seconds(calls(count)) for _ in range(_ROUNDS)) / count
    held = _LEAST_CAPTURED if eager > _LONG_SECONDS else _CAPTURED
    try:
        replay = queue.capture(calls(held))
    except RuntimeError:
        return Timing(1e6 * eager, 1e6 * eager, captured=False)
    queue.seconds(replay)  # its first launch uploads it
    replays = max(1, min(50, int(_ROUND_SECONDS / (held * eager))))

    def several() -> None:
        for _ in range(replays):
            replay()

    device = statistics.median(queue.seconds(several) for _ in range(_ROUNDS)) / (held * replays)
    return Timing(1e6 * device, 1e6 * eager, captured=True)


def context_is_gone(error: Exception, device: torch.device) -> bool:
    """Tell whether an error has ended the process's use of a GPU: nothing that is measured after it would be true.

    torch says so by AcceleratorError. Triton's own launches raise a plain RuntimeError ("Triton Error [CUDA]: ..."),
    also where only this launch was refused: the device is asked.
    """
    if isinstance(error, torch.AcceleratorError):
        return True
    if "Triton Error [CUDA]" not in str(error):
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def measure_us(function: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call on the device in microseconds, by a graph of calls where it can be captured."""
    return time_call(function, Cuda(device)).device_us
