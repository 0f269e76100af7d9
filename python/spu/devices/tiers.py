"""The tiers below a device that a training may use: memory of the host, and a folder on a disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spu.common.units import format_bytes, split_pairs
from spu.devices.manager import Device, parse_bytes

__all__ = ["Tiers", "parse_tiers", "split_budget"]

_FORM = "write disk=FOLDER:SIZE, e.g. disk=/data/spill:100GB"


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

    def check(self) -> None:
        """Raise ValueError where ``disk`` is no folder in which files can be made; a folder may be missing yet."""
        if self.disk is None:
            return
        folder = self.disk.absolute()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            raise ValueError(f"disk={self.disk}: {there} is a file; name a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"disk={self.disk}: nothing can be written in {there}; name another folder")

    def beside(self, devices: Sequence[Device]) -> Tiers:
        """Return the tiers with the memory of CPU devices beside a GPU as the host's, where none is given."""
        cpus = [device.budget_bytes for device in devices if device.torch_device.type == "cpu"]
        if self.host_bytes or len(cpus) == len(devices):
            return self
        return replace(self, host_bytes=sum(cpus))

    def __str__(self) -> str:
        host = [f"cpu={format_bytes(self.host_bytes)}"] if self.host_bytes else []
        disk = [f"disk={self.disk}:{format_bytes(self.disk_bytes)}"] if self.disk is not None else []
        return ",".join(host + disk) or "none"


def parse_tiers(text: str) -> Tiers:
    """Return the tiers of a text such as "cpu=32GB,disk=/data/spill:100GB"; either may be left out.

    Raises:
        ValueError: another entry, one given twice, or one that is no size; says how it is written.
    """
    rest, tiers = split_budget(text)
    host = 0
    for key, value in split_pairs(rest or "", "tiers", "SIZE", "cpu=32GB,disk=/data/spill:100GB"):
        if key.lower() != "cpu":
            raise ValueError(f"tiers {text!r}: {key} is no tier; there are cpu=SIZE and disk=FOLDER:SIZE")
        if host:
            raise ValueError(f"tiers {text!r} gives cpu twice; give one")
        host = _size(key, value)
    return Tiers(host, tiers.disk, tiers.disk_bytes)


def split_budget(text: str | None) -> tuple[str | None, Tiers]:
    """Return a budget without its disk, or None if that leaves nothing, and the disk.

    Args:
        text: such as "cuda:0=8GB,cpu=32GB,disk=/data/spill:100GB".

    Raises:
        ValueError: an entry that is not DEVICE=SIZE, or a disk that is not FOLDER:SIZE or is given twice.
    """
    rest, tiers = [], Tiers()
    for key, value in split_pairs(text or ""):
        if key.lower() != "disk":
            rest.append(f"{key}={value}")
            continue
        if tiers.disk is not None:
            raise ValueError(f"budget {text!r} gives disk twice; give one")
        folder, colon, size = value.rpartition(":")  # the folder's own name may have colons
        if not colon or not folder.strip():
            raise ValueError(f"disk={value} has no {'folder' if colon else 'size'}: {_FORM}")
        tiers = Tiers(disk=Path(folder.strip()).expanduser(), disk_bytes=_size(key, size))
    return ",".join(rest) or None, tiers


def _size(key: str, value: str) -> int:
    try:
        size = parse_bytes(value)
    except ValueError as error:
        raise ValueError(f"{key}={value}: {error}" + (f"; {_FORM}" if key.lower() == "disk" else "")) from None
    if size == 0:
        raise ValueError(f"{key}={value} is zero; leave it out, or give it room")
    return size
