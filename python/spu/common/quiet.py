"""Keep the screen free of what code prints that planning runs."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["hushed"]


class _Deaf:
    """A stream that drops the output of some threads."""

    def __init__(self, stream: Any, threads: set[int]) -> None:
        self._stream, self._threads = stream, threads

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() in self._threads else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def hushed() -> Iterator[Callable[[], None]]:
    """Drop what this thread prints and warns of: training will print it too, then of real values.

    Nor does torch log that a fake operator failed, which planning handles.

    Yields:
        A function that other threads call to have their output dropped too.
    """
    threads = {threading.get_ident()}
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    out: Any = _Deaf(sys.stdout, threads)
    err: Any = _Deaf(sys.stderr, threads)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            warnings.simplefilter("ignore")
            yield lambda: threads.add(threading.get_ident())
    finally:
        logger.disabled = before
