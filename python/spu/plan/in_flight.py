"""What a schedule has in flight, worked out once for all the placements that are tried under it."""

from __future__ import annotations

from functools import lru_cache

from spu import schedules
from spu.schedules import Action
from spu.schedules.simulate import FlatSchedule, flatten

__all__ = ["actions_of", "held_moments", "held_together", "in_flight_of", "skeleton_of"]


@lru_cache(maxsize=256)
def actions_of(schedule: str, ranks: int, microbatches: int, virtual: int) -> list[list[Action]]:
    """What each rank does in one run."""
    return schedules.get(schedule)(ranks, microbatches, virtual=virtual)


@lru_cache(maxsize=256)
def in_flight_of(schedule: str, ranks: int, microbatches: int, virtual: int) -> list[int]:
    """The most microbatches that each stage holds."""
    return schedules.peak_in_flight(actions_of(schedule, ranks, microbatches, virtual))


@lru_cache(maxsize=256)
def skeleton_of(schedule: str, ranks: int, microbatches: int, virtual: int) -> FlatSchedule:
    """The schedule as the simulator's arrays, without seconds."""
    actions = actions_of(schedule, ranks, microbatches, virtual)
    durations = [(0.0, 0.0, 0.0)] * (ranks * virtual)
    return flatten(actions, durations, [0.0] * (ranks * virtual - 1))


@lru_cache(maxsize=256)
def held_together(
    schedule: str, ranks: int, microbatches: int, virtual: int
) -> list[list[tuple[tuple[int, int], ...]]]:
    """Per rank, the sets of (stage, microbatches in flight) that occur at one time, less those within another."""
    result = []
    for row in actions_of(schedule, ranks, microbatches, virtual):
        last = {(a.stage, a.microbatch): a.kind for a in row}
        stages = sorted({a.stage for a in row})
        counts, opened = dict.fromkeys(stages, 0), set()
        seen: set[tuple[int, ...]] = set()
        for action in row:
            key = action.stage, action.microbatch
            if key not in opened:
                opened.add(key)
                counts[action.stage] += 1
                seen.add(tuple(counts.values()))
            if action.kind == last[key]:
                counts[action.stage] -= 1
        most = [a for a in seen if not any(a != b and all(x <= y for x, y in zip(a, b)) for b in seen)]
        result.append([tuple(zip(stages, counts_)) for counts_ in most])
    return result


@lru_cache(maxsize=256)
def held_moments(
    schedule: str, ranks: int, microbatches: int, virtual: int
) -> list[list[tuple[int, str, tuple[tuple[int, int, int], ...]]]]:
    """Per rank: (stage, kind of action, what else is held then), the last as (stage, microbatches between forward and
    backward, those between input gradient and weight gradient) for each stage, less what is within another."""
    result = []
    for row in actions_of(schedule, ranks, microbatches, virtual):
        stages = sorted({a.stage for a in row})
        full, left = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)
        seen: dict[tuple[int, str], set[tuple[int, ...]]] = {}
        for action in row:
            s = action.stage
            if action.kind == "W":
                left[s] -= 1
            elif action.kind != "F":
                full[s] -= 1
            counts = tuple(n for stage in stages for n in (full[stage], left[stage]))
            seen.setdefault((s, "W" if action.kind == "W" else "F"), set()).add(counts)
            full[s] += action.kind == "F"
            left[s] += action.kind == "I"
        moments = []
        for (s, kind), vectors in seen.items():
            most = [a for a in vectors if not any(a != b and all(x <= y for x, y in zip(a, b)) for b in vectors)]
            moments += [(s, kind, tuple(zip(stages, v[::2], v[1::2]))) for v in most]
        result.append(moments)
    return result
