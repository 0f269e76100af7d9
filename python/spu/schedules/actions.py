"""The actions of a rank, and schedules of them as text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = [
    "KINDS",
    "Action",
    "Actions",
    "ScheduleError",
    "check_counts",
    "check_virtual",
    "format_grid",
    "one_stage_each",
    "parse_grid",
    "peak_in_flight",
    "peak_on_ranks",
    "ranks_of",
    "stage_count",
]

KINDS = ("F", "B", "I", "W")
"""F forward, B full backward, I gradient of the stage's input, W gradient of its weights (I then W equals B)."""

_PATTERN = re.compile(r"(\d+)([FBIW])(\d+)")


class ScheduleError(ValueError):
    """A schedule that cannot be run as asked; the text says where and shows the grid."""


class Action(NamedTuple):
    """One unit of work of one stage: ``Action(2, "F", 0)`` prints, and parses, as ``2F0``."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Return the action that ``text`` names.

        Raises:
            ValueError: if the text is not STAGE KIND MICROBATCH, such as ``2F0``.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not an action; write stage, kind (F, B, I or W) and microbatch, as in '2F0'")
        return cls(int(match[1]), match[2], int(match[3]))


Actions = Sequence[Sequence[Action]]
"""A schedule: one list of actions per rank, each in the order in which the rank runs it. A rank may have several
stages; ``Action.stage`` counts over all of them, in the order in which a microbatch passes them."""


def parse_grid(text: str) -> list[list[Action]]:
    """Return one list of actions per non-empty line of ``text``: the actions of a rank, separated by blanks."""
    return [[Action.parse(word) for word in line.split()] for line in text.splitlines() if line.strip()]


def format_grid(actions: Actions, *, mark: tuple[int, int] | None = None, note: str = "") -> str:
    """Return the schedule as text: a column per rank, a line per position in the ranks' lists.

    Args:
        actions: one list per rank.
        mark: (rank, position) of a cell to put in brackets; a position past the end of its list marks the
            place where an action is missing.
        note: text behind the arrow on the marked line.
    """
    steps = max([len(row) for row in actions] + ([mark[1] + 1] if mark else [0]))
    heads = [f"rank {index}" for index in range(len(actions))]
    width = max([len(head) for head in heads] + [len(str(a)) + 2 for row in actions for a in row])
    margin = len(str(max(steps - 1, 0)))
    lines = [" ".join([" " * margin, *(head.ljust(width) for head in heads)]).rstrip()]
    for step in range(steps):
        cells = []
        for index, row in enumerate(actions):
            cell = str(row[step]) if step < len(row) else ""
            cells.append((f"[{cell}]" if mark == (index, step) else f" {cell} ").ljust(width))
        line = " ".join([str(step).rjust(margin), *cells]).rstrip()
        if mark is not None and mark[1] == step:
            line += f"  <-- ERROR HERE: {note}" if note else "  <-- ERROR HERE"
        lines.append(line)
    return "\n".join(lines)


def stage_count(actions: Actions) -> int:
    """Return the number of stages of a schedule: one more than the highest index, and at least one for each rank."""
    return max([len(actions), *(action.stage + 1 for row in actions for action in row)])


def ranks_of(actions: Actions) -> list[int]:
    """Return the rank of each stage, from the list that has its actions; stage ``s`` without any is on ``s % ranks``.

    Raises:
        ScheduleError: if two ranks have actions of one stage.
    """
    found: dict[int, int] = {}
    for rank, row in enumerate(actions):
        for action in row:
            if found.setdefault(action.stage, rank) != rank:
                raise ScheduleError(
                    f"stage {action.stage} is on rank {found[action.stage]}, but {action} is in the list of rank {rank}"
                )
    return [found.get(stage, stage % len(actions)) for stage in range(stage_count(actions))]


def peak_in_flight(actions: Actions) -> list[int]:
    """Return, per stage, the most microbatches whose forward has begun and whose backward has not yet ended.

    The saved activations of a stage are multiplied by this number. With a split backward a microbatch ends with its
    weight gradient (W). Without a backward in the schedule it ends with its forward.
    """
    peaks = [0] * stage_count(actions)
    for row in actions:
        for held in _held(row):
            for stage, count in held.items():
                peaks[stage] = max(peaks[stage], count)
    return peaks


def peak_on_ranks(actions: Actions, sizes: Sequence[float] | None = None) -> list[float]:
    """Return, per rank, the most microbatches in flight at one time, as in `peak_in_flight`, over its stages.

    Args:
        actions: one list per rank.
        sizes: the weight of one microbatch in flight at each stage, such as its saved bytes; 1 by default.
    """
    weights = [1] * stage_count(actions) if sizes is None else sizes
    return [
        max((sum(weights[stage] * count for stage, count in held.items()) for held in _held(row)), default=0)
        for row in actions
    ]


def _held(row: Sequence[Action]) -> Iterator[dict[int, int]]:
    """Yield, at the beginning of each action of a rank, stage -> microbatches in flight there."""
    last = {(a.stage, a.microbatch): a.kind for a in row}  # the kind of the last action of each microbatch
    open_: set[tuple[int, int]] = set()
    count: dict[int, int] = {}
    for action in row:
        key = action.stage, action.microbatch
        if key not in open_:
            open_.add(key)
            count[action.stage] = count.get(action.stage, 0) + 1
        yield count
        if action.kind == last[key]:
            open_.discard(key)
            count[action.stage] -= 1


def check_counts(ranks: int, microbatches: int) -> None:
    """Raise TypeError or ValueError unless both are positive integers."""
    _check_positive("ranks", ranks)
    _check_positive("microbatches", microbatches)


def check_virtual(virtual: int) -> None:
    """Raise TypeError or ValueError unless the number of stages on each rank is a positive integer."""
    _check_positive("virtual", virtual)


def one_stage_each(name: str, virtual: int) -> None:
    """Raise ValueError if a schedule with one stage on each rank gets another number."""
    if virtual != 1:
        raise ValueError(
            f"schedule {name!r} has one stage on each rank, so virtual must be 1, got {virtual!r}; "
            "'interleaved' and 'layer_outer' take more"
        )


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
