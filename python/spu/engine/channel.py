"""Mailboxes between stage workers, and the flag that stops all of them at the first failure."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Hashable
from typing import Any

__all__ = ["Aborted", "Exchange", "helping_kernels"]


class Aborted(Exception):
    """Raised in a worker that waits or continues after another one failed."""


class Exchange:
    """Keyed, single-use mailboxes shared by the workers of one run.

    A worker that waits for a message wakes as soon as the run is aborted, so a failure anywhere ends every worker
    after the action it is in.

    Args:
        helpers: so many workers, all on CPUs, take part in one another's products while they wait, with their cores;
            results are the same bit for bit. 0: they sleep.
    """

    def __init__(self, helpers: int = 0) -> None:
        self._condition = threading.Condition()
        self._messages: dict[Hashable, Any] = {}
        self._aborted = False
        self._at_work = helpers
        self._kernels = helping_kernels() if helpers > 1 else None

    def put(self, key: Hashable, message: Any) -> None:
        with self._condition:
            assert key not in self._messages, f"message {key} was sent twice"
            self._messages[key] = message
            self._changed()

    def take(self, key: Hashable) -> Any:
        """Wait for a message and remove it.

        Raises:
            Aborted: another worker failed.
        """
        self._wait(lambda: key in self._messages)
        with self._condition:
            if self._aborted:
                raise Aborted
            return self._messages.pop(key)

    def leave(self) -> None:
        """Say that the calling worker has done its part of the run; help until all have."""
        with self._condition:
            self._at_work -= 1
            self._changed()
        if self._kernels is not None:
            self._wait(lambda: self._at_work <= 0)

    def has(self, key: Hashable) -> bool:
        """Tell whether a message can be taken without waiting."""
        with self._condition:
            return key in self._messages

    def untaken(self) -> list[Any]:
        """Return the keys of all messages sent and not yet taken."""
        with self._condition:
            return list(self._messages)

    def abort(self) -> None:
        with self._condition:
            self._aborted = True
            self._messages.clear()
            self._changed()

    @property
    def aborted(self) -> bool:
        return self._aborted

    def _changed(self) -> None:
        self._condition.notify_all()
        if self._kernels is not None:
            self._kernels.ring()

    def _wait(self, is_there: Callable[[], bool]) -> None:
        """Wait until it is there, or the run is aborted."""
        if self._kernels is None:
            with self._condition:
                self._condition.wait_for(lambda: self._aborted or is_there())
            return
        while True:
            seen = self._kernels.rings()  # before the look: what changes after it rings once more
            with self._condition:
                if self._aborted or is_there():
                    return
            self._kernels.help_until(seen)

    def __len__(self) -> int:
        """Count the messages sent and not yet taken; 0 after a complete run."""
        return len(self._messages)


def helping_kernels() -> Any:
    """Return ``spu._C`` where a thread can wait in it, by a futex; None elsewhere, or where it was not built."""
    if sys.platform != "linux":
        return None
    try:
        return importlib.import_module("spu._C")
    except ImportError:
        return None
