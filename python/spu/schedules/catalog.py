"""The schedules by name, and the rank of each of their stages."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from spu.schedules.actions import Action, check_counts, check_virtual
from spu.schedules.gpipe import gpipe
from spu.schedules.interleaved import interleaved
from spu.schedules.layer_outer import layer_outer
from spu.schedules.one_f_one_b import one_f_one_b
from spu.schedules.zero_bubble import zb, zbv

__all__ = ["ScheduleFunction", "get", "names", "splits_backward", "stage_ranks", "stages_per_rank"]


class ScheduleFunction(Protocol):
    """The type of the functions that `get` returns."""

    def __call__(self, ranks: int, microbatches: int, *, virtual: int = ...) -> list[list[Action]]:
        """Return one list of actions per rank."""
        ...


class _Entry(NamedTuple):
    make: ScheduleFunction
    virtual: int  # stages on each rank by default
    any_virtual: bool = False
    splits_backward: bool = False
    turns_back: bool = False  # stages go down the ranks and back up, instead of round


_SCHEDULES = {
    "gpipe": _Entry(gpipe, 1),
    "1f1b": _Entry(one_f_one_b, 1),
    "interleaved": _Entry(interleaved, 2, any_virtual=True),
    "zb": _Entry(zb, 1, splits_backward=True),
    "zbv": _Entry(zbv, 2, splits_backward=True, turns_back=True),
    "layer_outer": _Entry(layer_outer, 1, any_virtual=True),
}


def names() -> list[str]:
    """Return the names that `get` takes."""
    return list(_SCHEDULES)


def get(name: str) -> ScheduleFunction:
    """Return the schedule function ``f(ranks, microbatches, *, virtual) -> actions`` of this name.

    Raises:
        ValueError: for an unknown name; lists those there are.
    """
    return _entry(name).make


def stages_per_rank(name: str, virtual: int | None = None) -> int:
    """Return the number of stages on each rank under a schedule.

    Args:
        name: of the schedule.
        virtual: the number asked for; None for the schedule's own number (2 for "interleaved" and "zbv", else 1).

    Raises:
        ValueError: the schedule cannot have that many, or its name is unknown.
    """
    entry = _entry(name)
    if virtual is None:
        return entry.virtual
    check_virtual(virtual)
    if virtual != entry.virtual and not entry.any_virtual:
        others = ", ".join(repr(other) for other, it in _SCHEDULES.items() if it.any_virtual)
        raise ValueError(
            f"schedule {name!r} has {entry.virtual} stage{'s' * (entry.virtual > 1)} on each rank, so virtual must be "
            f"{entry.virtual}, got {virtual}; any number goes with {others}"
        )
    return virtual


def stage_ranks(name: str, ranks: int, virtual: int | None = None) -> list[int]:
    """Return the rank of each stage under a schedule, in the order in which a microbatch passes the stages.

    Args:
        name: of the schedule.
        ranks: number of devices.
        virtual: stages on each rank; None for the schedule's own number.

    Raises:
        ValueError: as `stages_per_rank`.
    """
    check_counts(ranks, 1)
    count = stages_per_rank(name, virtual)
    if _entry(name).turns_back:
        return [*range(ranks), *reversed(range(ranks))]
    return [stage % ranks for stage in range(ranks * count)]


def splits_backward(name: str) -> bool:
    """Tell whether a schedule has I and W in place of B."""
    return _entry(name).splits_backward


def _entry(name: str) -> _Entry:
    if name not in _SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; there are {', '.join(map(repr, _SCHEDULES))}")
    return _SCHEDULES[name]
