"""The microbatches that a schedule has in flight, counted once for all the placements that are tried under it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from spu import schedules
from spu.plan.show.colors import WORDS
from spu.schedules import Action
from spu.schedules.simulate import FlatSchedule, flatten

__all__ = ["Held", "actions_of", "held_moments", "skeleton_of", "walk", "words_of_peak"]

Held = tuple[tuple[int, int, int], ...]
"""What a rank holds beside the action that runs: for each of its stages (stage, microbatches between forward and
backward, microbatches between input gradient and weight gradient)."""


@lru_cache(maxsize=256)
def actions_of(schedule: str, ranks: int, microbatches: int, virtual: int) -> list[list[Action]]:
    """Return what each rank does in one run."""
    return schedules.get(schedule)(ranks, microbatches, virtual=virtual)


@lru_cache(maxsize=256)
def skeleton_of(schedule: str, ranks: int, microbatches: int, virtual: int) -> FlatSchedule:
    """Return the schedule as the simulator's arrays, without seconds."""
    actions = actions_of(schedule, ranks, microbatches, virtual)
    return flatten(actions, [(0.0, 0.0, 0.0)] * (ranks * virtual), [0.0] * (ranks * virtual - 1))


def walk(row: Sequence[Action]) -> Iterator[tuple[Action, Held]]:
    """Yield each action of a rank with what the rank holds while it runs, the action's own microbatch left out."""
    stages = sorted({a.stage for a in row})
    full, left = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)
    for action in row:
        s = action.stage
        if action.kind == "W":
            left[s] -= 1
        elif action.kind != "F":
            full[s] -= 1
        yield action, tuple((stage, full[stage], left[stage]) for stage in stages)
        full[s] += action.kind == "F"
        left[s] += action.kind == "I"


def words_of_peak(row: Sequence[Action], size: Callable[[Action, Held], int]) -> str:
    """Return in words the first action of a rank in which it holds most, where `size` tells the bytes."""
    when, _ = max(walk(row), key=lambda moment: size(*moment))
    return f"in the {WORDS[when.kind]} of microbatch {when.microbatch} ({when})"


@lru_cache(maxsize=256)
def held_moments(schedule: str, ranks: int, microbatches: int, virtual: int) -> list[list[tuple[int, str, Held]]]:
    """Return per rank (stage, "W" or "F" for all other kinds, what is held beside it), less what is within another."""
    result = []
    for row in actions_of(schedule, ranks, microbatches, virtual):
        seen: dict[tuple[int, str], set[Held]] = {}
        for action, held in walk(row):
            seen.setdefault((action.stage, "W" if action.kind == "W" else "F"), set()).add(held)
        result.append(
            [
                (s, kind, a)
                for (s, kind), every in seen.items()
                for a in every
                if not any(a != b and all(x[1] <= y[1] and x[2] <= y[2] for x, y in zip(a, b)) for b in every)
            ]
        )
    return result
