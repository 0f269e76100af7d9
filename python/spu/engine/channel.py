"""Mailboxes between stage workers, and the flag that stops all of them at the first failure."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any

__all__ = ["Aborted", "Exchange"]


class Aborted(Exception):
    """Raised in a worker that waits or continues after another one failed."""


class Exchange:
    """Keyed, single-use mailboxes shared by the workers of one run.

    A worker that waits for a message wakes as soon as the run is aborted, so a failure anywhere ends every worker
    after the action it is in.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._messages: dict[Hashable, Any] = {}
        self._aborted = False

    def put(self, key: Hashable, message: Any) -> None:
        with self._condition:
            assert key not in self._messages, f"message {key} was sent twice"
            self._messages[key] = message
            self._condition.notify_all()

    def take(self, key: Hashable) -> Any:
        """Wait for a message and remove it.

        Raises:
            Aborted: another worker failed.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._aborted or key in self._messages)
            if self._aborted:
                raise Aborted
            return self._messages.pop(key)

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
            self._condition.notify_all()

    @property
    def aborted(self) -> bool:
        return self._aborted

    def __len__(self) -> int:
        """Count the messages sent and not yet taken; 0 after a complete run."""
        return len(self._messages)
