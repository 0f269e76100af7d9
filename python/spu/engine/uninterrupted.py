"""What must not be left half done: Ctrl-C waits until it is over."""

from __future__ import annotations

from collections.abc import Callable

from spu.common.interrupts import Held

__all__ = ["uninterrupted"]


def uninterrupted(task: Callable[[], None]) -> None:
    """Run a task to its end.

    Raises:
        KeyboardInterrupt: it came meanwhile; the task is done nevertheless.
        BaseException: whatever the task raised.
    """
    with Held():
        task()
