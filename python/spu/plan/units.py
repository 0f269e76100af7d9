"""Bytes and seconds as people read them."""

from __future__ import annotations

import math


def format_bytes(count: int | float) -> str:
    """``count`` bytes in powers of 1000 with three digits: "0 B", "64 B", "1.50 GB"; rounded to nearest."""
    return _in_units(count, round)


def format_bytes_up(count: int | float) -> str:
    """As `format_bytes`, rounded up: a budget written so is never smaller than ``count``."""
    return _in_units(count, math.ceil)


def _in_units(count: int | float, rounding: object) -> str:
    assert callable(rounding)
    if count < 0:
        return "-" + _in_units(-count, rounding)
    if count < 1000:
        return f"{rounding(count)} B"
    for power, unit in enumerate(("kB", "MB", "GB", "TB", "PB"), start=1):
        scale = 1000**power
        for digits in (2, 1, 0):
            steps = rounding(count * 10**digits / scale)
            if steps < 1000 or (digits == 0 and unit == "PB"):
                return f"{steps / 10**digits:.{digits}f} {unit}"
    raise AssertionError("unreachable: PB takes any number")


def format_seconds(seconds: float) -> str:
    """A duration with three digits: "12.3 ms", "1.50 s", "250 us"."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(seconds) >= 0.9995 * scale or unit == "us":
            return f"{seconds / scale:.3g} {unit}" if seconds < 999.5 * scale else f"{seconds / scale:.0f} {unit}"
    raise AssertionError("unreachable: us takes any number")
