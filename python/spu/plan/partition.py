"""Consecutive layers into stages of equal work, where nothing but the work counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from spu.plan import core

__all__ = ["BudgetError", "check_stages", "partition"]


class BudgetError(ValueError):
    """No partition fits the budgets.

    Attributes:
        stage: the stage that is shortest of memory in the partition that comes nearest to fitting.
        device: its device's name.
        needed_bytes: what that stage needs.
        budget_bytes: what it may use.
        short_bytes: the difference.
        fixes: what would fit, each tried.
    """

    def __init__(
        self,
        message: str,
        *,
        stage: int,
        needed_bytes: int,
        budget_bytes: int,
        device: str = "",
        fixes: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.stage = stage
        self.device = device
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes
        self.short_bytes = needed_bytes - budget_bytes
        self.fixes = tuple(fixes)


def check_stages(layers: int, stages: int) -> None:
    """Raises ValueError unless there is at least one stage and a layer for each."""
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
    count = len(costs)
    check_stages(count, stages)
    for index, value in enumerate(costs):
        if not 0 <= value < math.inf:
            raise ValueError(f"costs[{index}] must be a finite number, 0 or more, got {value}")
    per_layer, ends = [0] * count, [0] * (stages * (count + 1))
    problem = core.Problem(
        layers=count,
        stages=stages,
        recompute=core.NONE,
        forward=[float(value) for value in costs] * stages,
        backward=[0.0] * (stages * count),
        in_flight=[0] * stages,
        budgets=[0] * stages,
        enter_s=[0.0] * len(ends),
        leave_s=[0.0] * len(ends),
        **dict.fromkeys(core.LAYER_BYTES, per_layer),
        **dict.fromkeys(core.END_BYTES, ends),
    )
    cuts = core.place(problem, [])[0]
    return [range(first, last) for first, last in pairwise(cuts)]
