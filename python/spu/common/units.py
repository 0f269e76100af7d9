"""Bytes, seconds, columns of text and DEVICE=VALUE pairs as people read and write them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = ["columns", "format_bytes", "format_bytes_up", "format_seconds", "split_pairs"]


def format_bytes(count: int | float) -> str:
    """Format ``count`` bytes in powers of 1000 with three digits: "0 B", "64 B", "1.50 GB"; rounded to nearest."""
    return _in_units(round(count), lambda a, b: (2 * a + b) // (2 * b))


def format_bytes_up(count: int | float) -> str:
    """Like ``format_bytes``, rounded up: a budget written so is never smaller than ``count``."""
    return _in_units(math.ceil(count), lambda a, b: -(-a // b))


def _in_units(count: int, divide: Callable[[int, int], int]) -> str:
    """Format with ``divide`` for the rounding, in whole numbers: a float would lose the last bytes of a large count."""
    if count < 0:
        return "-" + _in_units(-count, divide)
    if count < 1000:
        return f"{count} B"
    for power, unit in enumerate(("kB", "MB", "GB", "TB", "PB"), start=1):
        for digits in (2, 1, 0):
            steps = divide(count * 10**digits, 1000**power)
            if steps < 1000 or (digits == 0 and unit == "PB"):
                return f"{steps / 10**digits:.{digits}f} {unit}"
    raise AssertionError("unreachable: PB takes any number")


def format_seconds(seconds: float) -> str:
    """Format a duration with three digits: "12.3 ms", "1.50 s", "250 us"."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(seconds) >= 0.9995 * scale or unit == "us":
            return f"{seconds / scale:.3g} {unit}" if seconds < 999.5 * scale else f"{seconds / scale:.0f} {unit}"
    raise AssertionError("unreachable: us takes any number")


def columns(rows: Sequence[Sequence[str]], left: int | None = None) -> list[str]:
    """Return aligned lines, the first ``left`` columns (default: all) to the left and the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) if left is None else left
    lines = ([c.ljust(w) if k < left else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths))] for row in rows)
    return ["  ".join(cells).rstrip() for cells in lines]


def split_pairs(
    text: str, what: str = "budget", form: str = "SIZE", example: str = "cuda:0=8GB,cpu=24GB"
) -> list[tuple[str, str]]:
    """Return the (device, value) entries of a text; raise ValueError where one is not DEVICE=`form`."""
    pairs = []
    for piece in filter(str.strip, text.split(",")):
        key, sign, value = map(str.strip, piece.partition("="))
        if not sign or not key or not value:
            raise ValueError(f"{piece.strip()!r} in {what} {text!r} is not DEVICE={form}; write e.g. {example}")
        pairs.append((key, value))
    return pairs
