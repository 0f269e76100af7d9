"""The tiers below a device that a training may use: memory of the host, and a folder on a disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Tiers"]


@dataclass(frozen=True)
class Tiers:
    """What lies below the devices, and how much of it may be used.

    Attributes:
        host_bytes: of the host's memory, beside what CPU devices may use; 0 for none.
        disk: the folder for files; None for no disk.
        disk_bytes: of that disk; 0 for none.
    """

    host_bytes: int = 0
    disk: Path | None = None
    disk_bytes: int = 0
