"""The exact search for stage boundaries: a dynamic programme over tables of what each run of layers costs a stage.

A table is a matrix [first, stop] of float64: the value of a stage with layers `first` to `stop - 1`, and infinity where
there is no such stage, or where it does not fit. There is one table per stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["Table", "best_cuts", "check_stages", "minimise", "partition", "runs", "sums_between"]

Table = NDArray[np.float64]


def check_stages(layers: int, stages: int) -> None:
    """Raise ValueError unless there is at least one stage and a layer for each."""
    if stages < 1:
        raise ValueError(f"stages must be at least 1, got {stages}")
    if stages > layers:
        raise ValueError(
            f"{stages} stages need at least {stages} layers, got {layers}: use {layers or 1} or fewer stages"
        )


def partition(costs: Sequence[float], stages: int) -> list[range]:
    """Split layers into stages so that the largest sum of costs is as small as it can be.

    Args:
        costs: work per layer, 0 or more.
        stages: number of stages; each gets at least one layer.

    Returns:
        One range of layer indices per stage; of equally good partitions the most even one.

    Raises:
        ValueError: more stages than layers, or a cost that is no finite number of 0 or more.
    """
    check_stages(len(costs), stages)
    for index, value in enumerate(costs):
        if not 0 <= value < math.inf:
            raise ValueError(f"costs[{index}] must be a finite number, 0 or more, got {value}")
    table = np.where(runs(len(costs)), sums_between(np.array(costs, dtype=np.float64)), math.inf)
    return [range(first, stop) for first, stop in pairwise(best_cuts([table] * stages, [])[0])]


def runs(layers: int) -> NDArray[np.bool_]:
    """Return a matrix [first, stop] that is true where a run of layers has at least one."""
    ends = np.arange(layers + 1)
    return ends[:, None] < ends[None, :]


def sums_between(values: NDArray) -> NDArray:
    """Return the matrix [first, stop] of the sums of ``values[first:stop]``."""
    sums = np.concatenate([np.zeros(1, values.dtype), np.cumsum(values)])
    return sums[None, :] - sums[:, None]


def best_cuts(seconds: Sequence[Table], slacks: Sequence[float]) -> list[list[int]]:
    """Find the partitions that are best for the slowest stage, and for the sum of all with a slowest not much slower.

    Args:
        seconds: a table per stage.
        slacks: how much slower than the best the slowest stage may be, as factors from 1.0 on; for each the partition
            with the smallest sum of seconds.

    Returns:
        Distinct lists of the S + 1 cuts (0 first, L last): the one whose slowest stage is fastest (the most even one
        of those), then those of `slacks`. Empty where every partition has an infinite stage.
    """
    slowest, cuts = minimise(seconds, np.maximum)
    if math.isinf(slowest):
        return []
    with np.errstate(over="ignore"):
        total, even = minimise([np.where(t <= slowest, t * t, math.inf) for t in seconds], np.add)
    results = [cuts if math.isinf(total) else even]  # squares of very large numbers are infinite
    for slack in slacks:
        total, found = minimise([np.where(t <= slowest * slack, t, math.inf) for t in seconds], np.add)
        if not math.isinf(total) and found not in results:
            results.append(found)
    return results


def minimise(tables: Sequence[Table], join: np.ufunc) -> tuple[float, list[int]]:
    """Return the smallest value of a partition, whose stages' values are joined by `join`, and its cuts.

    `best[s, stop]` is the minimum over `first` of `join(best[s - 1, first], tables[s][first, stop])`; of equal ones the
    smallest `first` counts.
    """
    best, choices = tables[0][0], []
    for table in tables[1:]:
        values = join(best[:, None], table)
        choices.append(values.argmin(axis=0))
        best = values.min(axis=0)
    cuts = [len(best) - 1]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    return float(best[-1]), [0, *reversed(cuts)]
