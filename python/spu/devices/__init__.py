"""What hardware there is, what it may use, and how fast it is."""

from __future__ import annotations

from spu.devices.manager import Device, DeviceManager, parse_bytes

__all__ = ["Device", "DeviceManager", "parse_bytes"]
