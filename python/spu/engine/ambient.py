"""What the caller's thread has switched on around a call, for the workers: such settings do not reach other threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

__all__ = ["callers_autocast"]


def callers_autocast(kinds: Iterable[str]) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast that is on here, to be entered there.

    Args:
        kinds: of devices, such as "cpu".
    """
    caches = torch.is_autocast_cache_enabled()
    active = [(kind, torch.get_autocast_dtype(kind)) for kind in set(kinds) if torch.is_autocast_enabled(kind)]
    if not active:
        return nullcontext

    def enter() -> AbstractContextManager[Any]:
        stack = ExitStack()
        for kind, dtype in active:
            stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=caches))
        return stack

    return enter
