"""In which order stages work: schedules as data, their validator and their simulator. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

from spu.schedules.actions import Action, Actions, ScheduleError, format_grid, parse_grid, peak_in_flight
from spu.schedules.gpipe import forward_only, gpipe
from spu.schedules.one_f_one_b import one_f_one_b
from spu.schedules.simulate import simulate
from spu.schedules.timeline import Span, Timeline
from spu.schedules.validate import validate

__all__ = [
    "Action",
    "Actions",
    "ScheduleError",
    "Span",
    "Timeline",
    "format_grid",
    "forward_only",
    "get",
    "gpipe",
    "names",
    "one_f_one_b",
    "parse_grid",
    "peak_in_flight",
    "simulate",
    "validate",
]

_SCHEDULES: dict[str, Callable[[int, int], list[list[Action]]]] = {"gpipe": gpipe, "1f1b": one_f_one_b}


def names() -> list[str]:
    """The names that `get` takes."""
    return list(_SCHEDULES)


def get(name: str) -> Callable[[int, int], list[list[Action]]]:
    """The schedule function ``f(stages, microbatches) -> actions`` of this name.

    Raises:
        ValueError: for an unknown name; lists those there are.
    """
    if name not in _SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; there are {', '.join(map(repr, _SCHEDULES))}")
    return _SCHEDULES[name]
