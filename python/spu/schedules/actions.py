"""What a stage does, one action at a time, and how a schedule of them is printed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

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
        """The action that ``text`` names.

        Raises:
            ValueError: if the text is not STAGE KIND MICROBATCH, such as ``2F0``.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not an action; write stage, kind (F, B, I or W) and microbatch, as in '2F0'")
        return cls(int(match[1]), match[2], int(match[3]))


Actions = Sequence[Sequence[Action]]
"""A schedule: one list of actions per stage, each in the order in which the stage runs it."""


def parse_grid(text: str) -> list[list[Action]]:
    """One list of actions per non-empty line of ``text``: the actions of a stage, separated by blanks."""
    return [[Action.parse(word) for word in line.split()] for line in text.splitlines() if line.strip()]


def format_grid(actions: Actions, *, mark: tuple[int, int] | None = None, note: str = "") -> str:
    """The schedule as text: a column per stage, a line per position in the stages' lists.

    Args:
        actions: one list per stage.
        mark: (stage row, position) of a cell to put in brackets; a position past the end of its list marks the
            place where an action is missing.
        note: what to write behind the arrow on the marked line.
    """
    steps = max([len(row) for row in actions] + ([mark[1] + 1] if mark else [0]))
    heads = [f"stage {index}" for index in range(len(actions))]
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


def peak_in_flight(actions: Actions) -> list[int]:
    """Per stage, the most microbatches whose forward has begun and whose backward has not yet ended.

    This is what the saved activations of a stage are multiplied by. With a split backward the weight gradient (W)
    is what ends it. A microbatch that has no backward in the schedule is let go when its forward ends.
    """
    peaks = []
    for row in actions:
        last = {a.microbatch: a.kind for a in row}  # the kind of the last action of each microbatch
        held: set[int] = set()
        peak = 0
        for action in row:
            held.add(action.microbatch)
            peak = max(peak, len(held))
            if action.kind == last[action.microbatch]:
                held.discard(action.microbatch)
        peaks.append(peak)
    return peaks


def check_counts(stages: int, microbatches: int) -> None:
    """Raises ValueError unless both are positive integers."""
    for name, value in (("stages", stages), ("microbatches", microbatches)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
