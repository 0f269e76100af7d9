"""What must not be left half done: Ctrl-C waits until it is over."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

__all__ = ["uninterrupted"]


def uninterrupted(task: Callable[[], None]) -> None:
    """Run a task to its end.

    Python raises Ctrl-C in the main thread only, so the task runs in another one.

    Raises:
        KeyboardInterrupt: it came meanwhile; the task is done nevertheless.
        BaseException: whatever the task raised.
    """
    context, over = contextvars.copy_context(), threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            context.run(task)
        except BaseException as error:
            errors.append(error)
        finally:
            over.set()

    thread = threading.Thread(target=run, name="spu update")
    thread.start()
    interrupted = False
    while not over.is_set():
        try:
            over.wait()
        except KeyboardInterrupt:
            interrupted = True
    thread.join()
    if errors:
        raise errors[0]
    if interrupted:
        raise KeyboardInterrupt
