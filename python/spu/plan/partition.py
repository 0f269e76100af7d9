"""Consecutive layers into stages: the exact dynamic programme over stage boundaries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from spu.plan.units import format_bytes, format_bytes_up

StageCost = Callable[[int, int, int], float]
"""``cost(stage, first, last)`` of putting layers first to last - 1 on a stage."""


class BudgetError(ValueError):
    """No partition fits the budgets.

    Attributes:
        stage: the stage that is shortest of memory in the partition that comes nearest to fitting.
        device: its device's name, or "" where devices are not known.
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


def minimax(layers: int, stages: int, cost: StageCost) -> tuple[float, list[range]]:
    """The partition whose dearest stage is cheapest, exactly.

    Dynamic programme over (stage, boundary): ``best[s][j] = min over i of max(best[s - 1][i], cost(s, i, j))``;
    layers^2 * stages evaluations of ``cost``, which may be infinite.

    Returns:
        The cost of the dearest stage and one range of layers per stage, each of at least one layer.
    """
    return _solve(layers, stages, cost, max)


def fastest(layers: int, stages: int, seconds: StageCost, fits: Callable[[int, int, int], bool]) -> list[range] | None:
    """The partition with the shortest slowest stage among those where every stage fits; None if none does.

    Of the equally good ones the most even one (least sum of squares): its pipeline fills and drains soonest.
    """

    def allowed(stage: int, first: int, last: int) -> float:
        return seconds(stage, first, last) if fits(stage, first, last) else math.inf

    slowest, parts = minimax(layers, stages, allowed)
    if math.isinf(slowest):
        return None

    def square(stage: int, first: int, last: int) -> float:
        value = allowed(stage, first, last)
        return value * value if value <= slowest else math.inf

    squares, even = _solve(layers, stages, square, lambda a, b: a + b)
    return even if math.isfinite(squares) else parts


def _solve(
    layers: int, stages: int, cost: StageCost, join: Callable[[float, float], float]
) -> tuple[float, list[range]]:
    check_stages(layers, stages)
    best = [[math.inf] * (layers + 1) for _ in range(stages)]
    cut = [[0] * (layers + 1) for _ in range(stages)]
    for last in range(1, layers - stages + 2):
        best[0][last] = cost(0, 0, last)
    for stage in range(1, stages):
        # Every earlier stage has taken a layer, and every later one needs one.
        for last in range(stage + 1, layers - stages + stage + 2):
            cut[stage][last] = stage
            for first in range(stage, last):
                if best[stage - 1][first] < best[stage][last]:
                    value = join(best[stage - 1][first], cost(stage, first, last))
                    if value < best[stage][last]:
                        best[stage][last], cut[stage][last] = value, first
    parts = [range(0)] * stages
    last = layers
    for stage in reversed(range(stages)):
        first = cut[stage][last] if stage else 0
        parts[stage] = range(first, last)
        last = first
    return best[-1][layers], parts


def check_stages(layers: int, stages: int) -> None:
    """Raises ValueError unless there is at least one stage and a layer for each."""
    if stages < 1:
        raise ValueError(f"stages must be at least 1, got {stages}")
    if stages > layers:
        raise ValueError(
            f"{stages} stages need at least {stages} layers, got {layers}: use {layers or 1} or fewer stages"
        )


def partition(
    costs: Sequence[float],
    stages: int,
    *,
    speeds: Sequence[float] | None = None,
    memory: Sequence[float] | None = None,
    budgets: Sequence[float] | None = None,
    boundary: float | Sequence[float] | None = None,
) -> list[range]:
    """Splits layers into stages so that the slowest stage is as fast as it can be.

    A stage takes ``sum(costs of its layers) / its speed``, plus ``boundary`` for each boundary it touches.

    Args:
        costs: work per layer, 0 or more.
        stages: number of stages; each gets at least one layer.
        speeds: work per unit of time of each stage; all 1 by default.
        memory: bytes per layer.
        budgets: bytes each stage may hold; needs ``memory``.
        boundary: time that a boundary costs the stages on both sides: one number, or one for each of the
            ``len(costs) - 1`` places between two layers.

    Returns:
        One range of layer indices per stage.

    Raises:
        ValueError: for more stages than layers, or numbers that make no sense.
        BudgetError: if no partition fits the budgets; says which is short by how much, and what budgets would do.
    """
    check_stages(len(costs), stages)
    speeds = _per_stage("speeds", [1.0] * stages if speeds is None else speeds, stages)
    if min(speeds) <= 0.0:
        raise ValueError(f"speeds must be above 0, got {list(speeds)}")
    cuts = _boundaries(boundary, len(costs))
    work = [0.0, *accumulate(_checked("costs", costs))]
    if (memory is None) != (budgets is None):
        raise ValueError("memory and budgets go together: give both or neither")

    def seconds(stage: int, first: int, last: int) -> float:
        return (work[last] - work[first]) / speeds[stage] + cuts[first] + cuts[last]

    if memory is None or budgets is None:
        parts = fastest(len(costs), stages, seconds, lambda stage, first, last: True)
        assert parts is not None, "every partition fits without budgets"
        return parts
    if len(memory) != len(costs):
        raise ValueError(f"memory must have one value per layer, {len(costs)}, got {len(memory)}")
    limits = _per_stage("budgets", budgets, stages)
    held = [0.0, *accumulate(_checked("memory", memory))]
    parts = fastest(len(costs), stages, seconds, lambda stage, first, last: held[last] - held[first] <= limits[stage])
    if parts is None:
        raise shortage(len(costs), stages, lambda stage, first, last: held[last] - held[first], limits).error()
    return parts


@dataclass(frozen=True)
class Shortage:
    """What a partition lacks under its budgets.

    Attributes:
        needed: bytes of each stage.
        budgets: bytes each may use.
        lines: one sentence per stage that is short of memory.
        enough: the budgets that would do, for those stages.
    """

    needed: tuple[int, ...]
    budgets: tuple[float, ...]
    lines: tuple[str, ...]
    enough: str

    def error(
        self,
        names: Sequence[str] = (),
        fixes: Sequence[str] = (),
        headline: str = "the budgets are too small for any partition; the nearest one is short:",
    ) -> BudgetError:
        """The error that says so, with ``fixes`` that were tried beside larger budgets."""
        worst = max(range(len(self.needed)), key=lambda stage: self.needed[stage] - self.budgets[stage])
        fixes = [*fixes, f"budgets of {self.enough}"]
        return BudgetError(
            "\n  ".join([headline, *self.lines]) + "\n  ".join(["\nwhat would fit:", *fixes]),
            stage=worst,
            device=names[worst] if names else "",
            needed_bytes=self.needed[worst],
            budget_bytes=int(self.budgets[worst]),
            fixes=fixes,
        )


def shortage(
    layers: int, stages: int, needs: StageCost, budgets: Sequence[float], names: Sequence[str] = ()
) -> Shortage:
    """What is missing where no partition fits, measured on the one that comes nearest to fitting.

    Nearest is where the stage that is shortest of memory lacks least; the exact dynamic programme finds it.
    """
    _, parts = minimax(layers, stages, lambda stage, first, last: needs(stage, first, last) - budgets[stage])
    return shortage_of(parts, needs, budgets, names)


def shortage_of(
    parts: Sequence[range], needs: StageCost, budgets: Sequence[float], names: Sequence[str] = ()
) -> Shortage:
    """What is missing for one given partition, which does not fit."""
    needed = [math.ceil(needs(stage, part.start, part.stop)) for stage, part in enumerate(parts)]
    lacking = [stage for stage, count in enumerate(needed) if count > budgets[stage]]
    assert lacking, "called for a partition that fits"
    lines = []
    for stage in lacking:
        part = parts[stage]
        which = f"layer {part.start}" if len(part) == 1 else f"layers {part.start} to {part.stop - 1}"
        lines.append(
            f"{_place(stage, names)} needs {format_bytes(needed[stage])} for {which} and may use "
            f"{format_bytes(budgets[stage])}: short by {format_bytes_up(math.ceil(needed[stage] - budgets[stage]))}"
        )
    enough = ", ".join(f"{format_bytes_up(needed[stage])} for {_place(stage, names)}" for stage in lacking)
    return Shortage(tuple(needed), tuple(budgets), tuple(lines), enough)


def _place(stage: int, names: Sequence[str]) -> str:
    return f"{names[stage]} (stage {stage})" if names else f"stage {stage}"


def _checked(name: str, values: Sequence[float]) -> list[float]:
    for index, value in enumerate(values):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}[{index}] must be a finite number, 0 or more, got {value}")
    return list(values)


def _per_stage(name: str, values: Sequence[float], stages: int) -> list[float]:
    if len(values) != stages:
        raise ValueError(f"{name} must have one value per stage, {stages}, got {len(values)}")
    return _checked(name, values)


def _boundaries(boundary: float | Sequence[float] | None, layers: int) -> list[float]:
    """[layers + 1] what a cut in front of each layer costs; nothing at both ends."""
    if boundary is None:
        inner = [0.0] * (layers - 1)
    elif isinstance(boundary, Sequence):
        inner = _checked("boundary", boundary)
        if len(inner) != layers - 1:
            raise ValueError(
                f"boundary must have one value per place between two layers, {layers - 1}, got {len(inner)}"
            )
    else:
        inner = _checked("boundary", [boundary]) * (layers - 1)
    return [0.0, *inner, 0.0]
