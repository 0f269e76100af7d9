"""What must not be left half done: Ctrl-C waits until it is over."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

__all__ = ["uninterrupted"]

_NEVER_S = 10.0  # a thread that has not begun by then will not


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
    interrupted = False
    try:
        thread.start()  # waits for the thread, which may be in the midst of the task when Ctrl-C comes
    except KeyboardInterrupt:
        interrupted = True
    while not over.is_set():
        try:
            if not over.wait(_NEVER_S) and thread.ident is None:
                raise KeyboardInterrupt  # it came before there was a thread: nothing has been done
        except KeyboardInterrupt:
            if thread.ident is None and interrupted:
                raise
            interrupted = True
    thread.join()
    if errors:
        raise errors[0]
    if interrupted:
        raise KeyboardInterrupt
