"""Threads of a test."""

from __future__ import annotations

import threading
from collections.abc import Callable


def together(*tasks: Callable[[], object]) -> None:
    """Run each in a thread of its own, side by side, until all have ended."""
    threads = [threading.Thread(target=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
