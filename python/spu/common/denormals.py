"""Denormal numbers as the calling thread has them: computed with, or flushed to zero (`torch.set_flush_denormal`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["call_as", "flushes_denormals"]

P = ParamSpec("P")
T = TypeVar("T")

# Variables, since the compiler would fold a product of constants, in a mode of its own.
_SMALLEST_NORMAL, _HALF = 2.0**-1022, 0.5


def flushes_denormals() -> bool:
    """Return whether the calling thread takes denormal numbers for zero. torch sets that and has no question for it."""
    return _SMALLEST_NORMAL * _HALF == 0.0


def call_as(flushes: bool, function: Callable[P, T], *args: P.args, **keywords: P.kwargs) -> T:
    """Call ``function`` in a thread whose mode is made ``flushes`` first.

    The mode is a register of each core's thread. A new thread takes its parent's, later changes reach nobody else.
    """
    if flushes_denormals() != flushes:
        torch.set_flush_denormal(flushes)
    return function(*args, **keywords)
