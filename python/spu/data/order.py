"""The order of a shuffled epoch, as a function: no list of it is ever made, and none has to be saved."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["shuffled"]

_ROUNDS = 6
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64's finaliser (Steele et al., OOPSLA 2014)
_GOLDEN = 0x9E3779B97F4A7C15


def shuffled(places: np.ndarray[Any, Any], count: int, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    """Return which of ``count`` items stand at ``places`` of a shuffled epoch.

    A Feistel network over the next power of 4 is a permutation whatever its round function is (Luby and Rackoff, 1988).
    What falls outside is sent through it again until it is inside, which keeps it a permutation of those inside.

    Args:
        places: int64 [n], each from 0 to count - 1.
        count: of the items.
        seed, epoch: which order; any whole numbers.

    Returns:
        int64 [n], each from 0 to count - 1; all places together give every item once.
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    keys = [_mixed_int((seed % 2**64) * _GOLDEN + epoch * 64 + round_) for round_ in range(_ROUNDS)]
    value = places.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> np.uint64(half), value[outside] & low
        for key in keys:
            left, right = right, left ^ (_mixed(right + np.uint64(key)) & low)
        value[outside] = (left << np.uint64(half)) | right
        outside = value >= np.uint64(count)
    return value.astype(np.int64)


def _mixed(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return splitmix64's finaliser of uint64, which wraps around as it is meant to."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_FACTORS[0])
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_FACTORS[1])
    return value ^ (value >> np.uint64(31))


def _mixed_int(value: int) -> int:
    return int(_mixed(np.array([value % 2**64], dtype=np.uint64))[0])
