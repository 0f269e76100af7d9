"""A document before and after the tokenizer: what is trained in it, and where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Example", "Tokens"]


@dataclass(frozen=True, slots=True)
class Example:
    """A document as text.

    Attributes:
        where: the file and the line, for messages.
        text: all of it.
        spans: (begin, end) of the characters that are trained, in order; None for all.
        closed: whether the tokenizer's own beginning and end-of-text tokens are put around it; a chat template writes
            them itself.
    """

    where: str
    text: str
    spans: Sequence[tuple[int, int]] | None = None
    closed: bool = True


@dataclass(frozen=True, slots=True)
class Tokens:
    """A document as tokens.

    Attributes:
        ids: integers [tokens].
        trained: bool [tokens]: which of them are targets; None for all. The first never is: nothing comes before it.
    """

    ids: np.ndarray[Any, Any]
    trained: np.ndarray[Any, Any] | None = None

    @property
    def targets(self) -> int:
        """How many tokens there are to learn."""
        return max(len(self.ids) - 1, 0) if self.trained is None else int(self.trained[1:].sum())
