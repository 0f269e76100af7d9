"""Memory that is a mapping of a file: what is written to it in large pieces goes to the file by a call to the system.

Writing through a mapping stops at each page of 4 KiB, which the system has to find and to mark: weights came into a
disk's file at a third of the speed. On Linux both ways write the same pages, so each sees what the other wrote.
"""

from __future__ import annotations

import os
import sys
import weakref
from typing import Any

import torch
from torch import Tensor

from spu.common.raw import bytes_of

__all__ = ["LEAST_BYTES", "backed", "copy_in"]

LEAST_BYTES = 1 << 20  # below, a call takes longer than it saves
_PIECE = 4 << 20  # values that are converted at once

_PLACES: weakref.WeakKeyDictionary[Any, tuple[int, int, int]] = weakref.WeakKeyDictionary()


def backed(owner: object, address: int, size: int, fd: int) -> None:
    """Note that memory is a shared mapping of a file from its beginning, as long as ``owner`` lives.

    Nothing is noted where the file cannot be opened once more (it has another position and no direct I/O then).

    Args:
        owner: what keeps the mapping; it can be referred to weakly.
        address: of its first byte.
        size: its bytes.
        fd: of the file.
    """
    if sys.platform != "linux":
        return
    try:
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    weakref.finalize(owner, os.close, again)
    _PLACES[owner] = address, size, again


@torch.no_grad()
def copy_in(into: Tensor, values: Tensor) -> None:
    """Do ``into.copy_(values)``, by way of the file where ``into`` is a large part of one's mapping.

    Raises:
        OSError: the disk refused.
    """
    place = _place(into) if into.nbytes >= LEAST_BYTES and values.shape == into.shape else None
    if place is None or values.device.type != "cpu" or not (into.is_contiguous() and values.is_contiguous()):
        into.copy_(values)
        return
    fd, at = place
    for part in values.view(-1).split(_PIECE):
        left = bytes_of(part.to(into.dtype)).numpy().data
        while left:
            done = os.pwrite(fd, left, at)
            left, at = left[done:], at + done


def _place(tensor: Tensor) -> tuple[int, int] | None:
    """Return the file that a tensor lies in, and where there; None: in none that is known."""
    if tensor.device.type != "cpu":
        return None
    start = tensor.data_ptr()
    for address, size, fd in list(_PLACES.values()):
        if address <= start and start + tensor.nbytes <= address + size:
            return fd, start - address
    return None
