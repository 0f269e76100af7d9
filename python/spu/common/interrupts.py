"""Ctrl-C waits until work that must not be cut in two has ended."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["delayed_interrupts", "stop_if_asked"]

_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
_holding: list[delayed_interrupts] = []  # of the main thread, the only one that runs signal handlers


class delayed_interrupts:
    """Keep the exception that a signal handler raises inside, and raise it at the end: nothing inside is cut in two.

    Python runs signal handlers between any two operations of the main thread. Ctrl-C, whose handler raises, may
    come while a lock of ``threading`` or ``concurrent.futures`` is half taken, or within the ``except`` that handles
    an earlier Ctrl-C. Handlers run at once as always; only their exception waits.

    Args:
        on_interrupt: called within the handler when an exception waits, to ask the work to end early. It may be called
            more than once and must take no lock; ``SimpleQueue.put`` takes none.
    """

    def __init__(self, on_interrupt: Callable[[], Any] | None = None) -> None:
        self._raised: BaseException | None = None
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._tell = [] if on_interrupt is None else [on_interrupt]
        self._outer: delayed_interrupts | None = None

    def __enter__(self) -> delayed_interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self
        if _holding:
            self._outer = _holding[0]
            self._outer._tell += self._tell
            if self._outer._raised is not None:
                self._call(self._tell)
            return self
        for signum in _SIGNALS:
            handler = signal.getsignal(signum)
            if callable(handler):
                self._before[signum] = handler
                signal.signal(signum, self._note)
        _holding.append(self)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        try:
            self._before[signum](signum, frame)
        except BaseException as error:
            self._raised = self._raised or error
            self._call(self._tell)

    @staticmethod
    def _call(functions: list[Callable[[], Any]]) -> None:
        for function in functions:
            function()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._outer is not None:
            for function in self._tell:
                self._outer._tell.remove(function)
            return
        if self in _holding:
            _holding.remove(self)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if self._raised is not None:
            raise self._raised


def stop_if_asked() -> None:
    """Raise the interrupt that waits, if there is one; called where a long ``delayed_interrupts`` may end early."""
    if _holding and _holding[0]._raised is not None and threading.current_thread() is threading.main_thread():
        raise _holding[0]._raised
