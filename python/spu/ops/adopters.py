"""Who may give parameters a sink in a backward: each `spu.GradScaler` while it lives."""

from __future__ import annotations

import weakref
from typing import Any

__all__ = ["may_adopt", "will_adopt"]

_ADOPTERS: weakref.WeakSet[Any] = weakref.WeakSet()


def will_adopt(owner: object) -> None:
    """Remember that backwards in scopes of ``owner``, while it lives, may give parameters sinks."""
    _ADOPTERS.add(owner)


def may_adopt() -> bool:
    """Tell whether parameters without a sink may be given one in a backward."""
    return len(_ADOPTERS) > 0
