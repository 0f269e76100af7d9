"""The exact search over stage boundaries and recomputed layers: a dynamic programme, here and in C++.

The C++ twin, ``csrc/host/place.cpp``, computes the same sums and maxima in the same order, and so finds the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

__all__ = [
    "END_BYTES",
    "LAYER_BYTES",
    "Choice",
    "Problem",
    "StageCosts",
    "nearest",
    "nearest_python",
    "place",
    "place_python",
]

NONE, ALL, AUTO = 0, 1, 2
"""Recompute: no layer, every layer, or as few as the budget asks for."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Stages of consecutive layers under budgets, as arrays. Tables are row by row; L layers, S stages.

    The bytes of a stage with layers i to j - 1 are the sum of ``fixed`` and the ``*_fixed`` of its two ends, plus
    ``in_flight`` times what each microbatch keeps, plus the largest workspace. C++ reads the fields by name.
    """

    layers: int
    stages: int
    recompute: int  # NONE, ALL or AUTO
    forward: list[float]  # [S * L] seconds
    backward: list[float]  # [S * L] seconds
    fixed: list[int]  # [L] bytes held all the time
    own: list[int]  # [L] bytes per microbatch: what a layer that is kept leaves behind
    inner: list[int]  # [L] bytes per microbatch: its input, if it is not the stage's first and kept
    inner_recomputed: list[int]  # [L] bytes, the same if it is recomputed
    extra: list[int]  # [L] bytes of workspace if kept
    extra_recomputed: list[int]  # [L] bytes of workspace if recomputed
    in_flight: list[int]  # [S] microbatches
    budgets: list[int]  # [S] bytes
    enter_fixed: list[int]  # [S * (L + 1)] bytes if the stage's first layer is the column
    enter_each: list[int]  # [S * (L + 1)] bytes of its input, per microbatch
    enter_recomputed: list[int]  # [S * (L + 1)] bytes, the same if the first layer is recomputed
    leave_fixed: list[int]  # [S * (L + 1)] bytes if the stage ends before the column
    leave_each: list[int]  # [S * (L + 1)] bytes per microbatch
    leave_extra: list[int]  # [S * (L + 1)] bytes of workspace
    enter_s: list[float]  # [S * (L + 1)] seconds per microbatch
    leave_s: list[float]  # [S * (L + 1)] seconds per microbatch


LAYER_BYTES = ("fixed", "own", "inner", "inner_recomputed", "extra", "extra_recomputed")
END_BYTES = ("enter_fixed", "enter_each", "enter_recomputed", "leave_fixed", "leave_each", "leave_extra")
"""Fields of a problem: bytes by layer, and by stage and cut."""


class Choice(NamedTuple):
    """A stage's layers weighed: seconds of a microbatch, peak bytes, and which layers are recomputed."""

    seconds: float
    needed: int
    recomputed: list[int]


class StageCosts:
    """Weighs runs of layers on the stages of one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        count = problem.layers
        rows = [range(s * count, (s + 1) * count) for s in range(problem.stages)]
        self._seconds = [[0.0, *accumulate(problem.forward[k] + problem.backward[k] for k in row)] for row in rows]
        self._fixed = [0, *accumulate(problem.fixed)]
        self._own = [0, *accumulate(problem.own)]
        self._inner = [0, *accumulate(problem.inner)]
        self._orders: dict[int, list[int]] = {}

    def weigh(self, stage: int, first: int, last: int) -> Choice:
        """A stage with layers ``first`` to ``last - 1``: as few recomputed as fit, where the problem says AUTO."""
        p = self.problem
        enter, leave = stage * (p.layers + 1) + first, stage * (p.layers + 1) + last
        seconds = self._seconds[stage][last] - self._seconds[stage][first] + p.enter_s[enter] + p.leave_s[leave]
        fixed = self._fixed[last] - self._fixed[first] + p.enter_fixed[enter] + p.leave_fixed[leave]
        each = self._own[last] - self._own[first] + self._inner[last] - self._inner[first + 1]
        each += p.enter_each[enter] + p.leave_each[leave]
        extra = max(p.leave_extra[leave], *p.extra[first:last])
        flying, budget = p.in_flight[stage], p.budgets[stage]
        needed = fixed + flying * each + extra
        if p.recompute == NONE or (p.recompute == AUTO and needed <= budget):
            return Choice(seconds, needed, [])
        recomputed: list[int] = []
        for k in self._order(stage):
            if not first <= k < last:
                continue
            at_end = p.enter_each[enter] - p.enter_recomputed[enter]
            saved = p.own[k] + (at_end if k == first else p.inner[k] - p.inner_recomputed[k])
            if p.recompute == AUTO and saved <= 0:
                continue
            recomputed.append(k)
            each -= saved
            extra = max(extra, p.extra_recomputed[k])
            seconds += p.forward[stage * p.layers + k]
            needed = fixed + flying * each + extra
            if p.recompute == AUTO and needed <= budget:
                break
        return Choice(seconds, needed, recomputed)

    def _order(self, stage: int) -> list[int]:
        """Layers by what recomputing them saves, most bytes for a second first; ties by index."""
        if stage not in self._orders:
            p = self.problem

            def worth(k: int) -> float:
                saved = float(p.own[k] + p.inner[k] - p.inner_recomputed[k])
                seconds = p.forward[stage * p.layers + k]
                return saved / seconds if seconds > 0.0 else (math.inf if saved > 0 else 0.0)

            self._orders[stage] = sorted(range(p.layers), key=lambda k: (-worth(k), k))
        return self._orders[stage]


def place(problem: Problem, slacks: Sequence[float], backend: str = "auto") -> list[list[int]]:
    """The best partitions: for the slowest stage, and for the sum of all stages with a slowest one not much slower.

    Args:
        problem: what to place.
        slacks: how much slower than the best the slowest stage may be, as factors from 1.0 on; for each the partition
            with the least sum of seconds.
        backend: "python", "cpp", or "auto": cpp if it was built.

    Returns:
        Distinct lists of the S + 1 cuts (0 first, L last): the one whose slowest stage is fastest (the most even one
        of those), then those of ``slacks``. Empty if nothing fits the budgets.
    """
    run = _backend("best_cuts", backend)
    return place_python(problem, list(slacks)) if run is None else run(problem, list(slacks))


def nearest(problem: Problem, backend: str = "auto") -> list[int]:
    """The cuts where the stage that is shortest of memory lacks least, whether or not that fits."""
    run = _backend("nearest_cuts", backend)
    return nearest_python(problem) if run is None else run(problem)


def _backend(name: str, backend: str) -> Callable[..., list] | None:
    if backend not in ("auto", "python", "cpp"):
        raise ValueError(f"backend must be 'auto', 'python' or 'cpp', got {backend!r}")
    if backend == "python":
        return None
    try:
        from spu import _host
    except ImportError as error:
        if backend == "cpp":
            raise RuntimeError("spu._host is not built: install with a C++ compiler, or use 'python'") from error
        return None
    return getattr(_host, name, None)  # an older build may lack it


def place_python(p: Problem, slacks: list[float]) -> list[list[int]]:
    """`place`, in Python."""
    table = _table(p, lambda choice, stage: choice.seconds if choice.needed <= p.budgets[stage] else math.inf)
    slowest, cuts = _solve(p, table, max)
    if math.isinf(slowest):
        return []
    even = [[v * v if v <= slowest else math.inf for v in row] for row in table]
    total, found = _solve(p, even, _add)
    results = [cuts if math.isinf(total) else found]
    for slack in slacks:
        capped = [[v if v <= slowest * slack else math.inf for v in row] for row in table]
        total, found = _solve(p, capped, _add)
        if not math.isinf(total) and found not in results:
            results.append(found)
    return results


def nearest_python(p: Problem) -> list[int]:
    """`nearest`, in Python."""
    return _solve(p, _table(p, lambda choice, stage: float(choice.needed - p.budgets[stage])), max)[1]


def _add(a: float, b: float) -> float:
    return a + b


def _table(p: Problem, value: Callable[[Choice, int], float]) -> list[list[float]]:
    """[S][first * (L + 1) + last] the value of every run of layers on every stage that can have it."""
    scale = StageCosts(p)
    table = []
    for stage in range(p.stages):
        row = [math.inf] * (p.layers + 1) ** 2
        for first in range(stage, p.layers - p.stages + stage + 1) if stage else (0,):
            lasts = range(first + 1, p.layers - p.stages + stage + 2) if stage < p.stages - 1 else (p.layers,)
            for last in lasts:
                row[first * (p.layers + 1) + last] = value(scale.weigh(stage, first, last), stage)
        table.append(row)
    return table


def _solve(p: Problem, table: list[list[float]], join: Callable[[float, float], float]) -> tuple[float, list[int]]:
    """``best[s][j] = min over i of join(best[s - 1][i], table[s][i, j])`` and the cuts that reach it."""
    count, stages = p.layers, p.stages
    best = [[math.inf] * (count + 1) for _ in range(stages)]
    cut = [[0] * (count + 1) for _ in range(stages)]
    best[0][1:] = table[0][1 : count + 1]
    for stage in range(1, stages):
        for last in range(stage + 1, count + 1):
            cut[stage][last] = stage
            for first in range(stage, last):
                before = best[stage - 1][first]
                if before < best[stage][last]:
                    value = join(before, table[stage][first * (count + 1) + last])
                    if value < best[stage][last]:
                        best[stage][last], cut[stage][last] = value, first
    cuts = [count]
    for stage in range(stages - 1, 0, -1):
        cuts.append(cut[stage][cuts[-1]])
    return best[-1][count], [0, *reversed(cuts)]
