"""Ctrl-C and SIGTERM as a wish to stop after the step at hand, so that a checkpoint can be written."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["StopSignals", "Stopped"]


class Stopped(Exception):
    """The run was asked to stop, and has ended cleanly: the command's exit code is 0."""


class StopSignals:
    """Within ``with``: the first signal is noted in ``asked``; a second one, of either kind, interrupts at once."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = signum

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            if handler is not None:  # else it was set from C, where Python cannot set it again
                signal.signal(signum, handler)
