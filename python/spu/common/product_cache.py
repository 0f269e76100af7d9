"""What torch keeps for every shape of a 16-bit product on a CPU: as many shapes as a budget has room for.

Two caches hold 1,024 shapes each, and nothing but newer shapes takes the old ones' place:

- oneDNN's, one for the process: compiled code and what it was made of, 0.3 to 0.5 MB a shape (bf16 most);
- torch's own, one for each thread that multiplies: descriptions of products, 0.26 MB a shape.

A model of few shapes never fills them. A mixture of experts that torch multiplies does within a step or two, because an
expert has other numbers of rows in every layer and microbatch: 0.5 GB for one CPU device, 0.8 GB for two.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

__all__ = ["VARIABLES", "bound_product_caches", "shapes_kept"]

VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # the process's cache, each thread's
_SHAPE_BYTES, _THREADS_SHAPE_BYTES = 400 << 10, 260 << 10
_PART = 16  # of the budgets
_FEWEST, _DEFAULT = 64, 1024


def shapes_kept(budgets: Sequence[int]) -> int:
    """Return how many shapes fit a sixteenth of what CPU devices may use together; at least 64, at most 1,024.

    Args:
        budgets: bytes, of each device; each has a thread that multiplies.
    """
    room = sum(budgets) // _PART
    return min(max(room // (_SHAPE_BYTES + len(budgets) * _THREADS_SHAPE_BYTES), _FEWEST), _DEFAULT)


def bound_product_caches(budgets: Sequence[int]) -> None:
    """Set the sizes of both caches for this process, unless its environment does or the default has room.

    Processes that begin later inherit both: a loader's worker that multiplies 16-bit values keeps as few shapes.

    torch reads them at a process's first 16-bit product (oneDNN's: at the first of its products or convolutions), so
    it has to be called before that, and changes nothing later.
    """
    kept = shapes_kept(budgets) if budgets else _DEFAULT
    if kept < _DEFAULT:
        for name in VARIABLES:
            os.environ.setdefault(name, str(kept))
