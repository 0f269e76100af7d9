"""The batches of a run, one made while the device is still at work on the one before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Batches"]


class Batches:
    """A run's batches, by index.

    Args:
        of: index, sequences, tokens of a sequence -> inputs and targets, from the arguments alone.
        batch, seq: sequences of a batch, and their tokens.
    """

    def __init__(self, of: Callable[[int, int, int], tuple[Any, Any]], batch: int, seq: int) -> None:
        self._of, self._batch, self._seq = of, batch, seq
        self._made: tuple[int, tuple[Any, Any]] | None = None

    def make(self, index: int) -> None:
        """Make a batch that is likely to be taken next. What fails here is raised by :meth:`take`, if it comes to it:
        the step before, which is done, is recorded and saved as ever.
        """
        try:
            self._made = index, self._of(index, self._batch, self._seq)
        except Exception:
            self._made = None

    def take(self, index: int) -> tuple[Any, Any]:
        """Return a batch, and keep it no longer."""
        made, self._made = self._made, None
        if made is not None and made[0] == index:
            return made[1]
        return self._of(index, self._batch, self._seq)
