"""Who has started this process, as its environment tells. Imports no torch."""

from __future__ import annotations

import os

__all__ = ["in_several_processes"]


def in_several_processes() -> bool:
    """Tell whether torchrun has started this process with others beside it."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
