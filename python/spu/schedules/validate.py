"""Proof that a schedule can be run: complete, in order, without deadlock."""

from __future__ import annotations

from collections.abc import Iterator

from spu.schedules.actions import KINDS, Action, Actions, ScheduleError, check_counts, format_grid


def validate(actions: Actions, stages: int, microbatches: int, *, forward_only: bool = False) -> None:
    """Checks that every stage does all of its work, in an order that all stages together can run.

    On each stage every microbatch has one F, and then either one B or one I followed by one W. Forwards, and the
    actions that add weight gradients (B and W), are in ascending microbatch order: the sums are then those of one
    device, bit for bit, and channels between stages need no reordering. No action waits for one that cannot come.

    Args:
        actions: one list of actions per stage.
        stages: how many stages there must be.
        microbatches: how many microbatches each must process.
        forward_only: expect forwards alone, as for evaluation.

    Raises:
        ScheduleError: whose text is the reason and the grid with the first bad action marked. "First" is by position
            in the stages' lists, then by stage.
    """
    check_counts(stages, microbatches)
    if len(actions) != stages:
        raise ScheduleError(f"the schedule has {len(actions)} lists of actions for {stages} stages")
    bad = min((found for row in range(stages) for found in _row_faults(actions, row, microbatches, forward_only)),
              key=lambda found: (found[1], found[0]), default=None)  # fmt: skip
    if bad is None:
        bad = find_deadlock(actions)
    if bad is not None:
        raise marked_error(actions, *bad)


def marked_error(actions: Actions, row: int, position: int, reason: str) -> ScheduleError:
    """The error that shows the grid with one action marked."""
    grid = format_grid(actions, mark=(row, position), note=reason)
    return ScheduleError(f"invalid schedule, stage {row}, position {position}: {reason}\n{grid}")


def needs(action: Action, stages: int) -> list[tuple[Action, ...]]:
    """What must have ended before ``action`` starts: groups of which one member each is enough."""
    stage, kind, i = action
    if kind == "F":
        return [(Action(stage - 1, "F", i),)] if stage else []
    if kind == "W":
        return [(Action(stage, "I", i),)]
    own: list[tuple[Action, ...]] = [(Action(stage, "F", i),)]
    if stage < stages - 1:
        own.append((Action(stage + 1, "B", i), Action(stage + 1, "I", i)))
    return own


def find_deadlock(actions: Actions) -> tuple[int, int, str] | None:
    """Runs the schedule without a clock; (row, position, reason) of the first action that can never start."""
    done: set[Action] = set()
    heads = [0] * len(actions)
    moved = True
    while moved:
        moved = False
        for index, row in enumerate(actions):
            while heads[index] < len(row) and not _missing(row[heads[index]], len(actions), done):
                done.add(row[heads[index]])
                heads[index] += 1
                moved = True
    stuck = [index for index, row in enumerate(actions) if heads[index] < len(row)]
    if not stuck:
        return None
    waits = []
    for index in stuck:
        action = actions[index][heads[index]]
        waits.append(f"{action} waits for {_missing(action, len(actions), done)}")
    first = min(stuck, key=lambda index: (heads[index], index))
    return first, heads[first], "deadlock: " + ", ".join(waits)


def _missing(action: Action, stages: int, done: set[Action]) -> str:
    for group in needs(action, stages):
        if not any(need in done for need in group):
            return str(group[0])
    return ""


def _row_faults(actions: Actions, row: int, microbatches: int, forward_only: bool) -> Iterator[tuple[int, int, str]]:
    """The first fault that one stage's list shows by itself, as (row, position, reason)."""
    seen: dict[tuple[str, int], int] = {}
    newest = {"F": -1, "gradient": -1}
    for position, action in enumerate(actions[row]):
        reason = _fault(action, row, microbatches, seen, newest, forward_only)
        if reason:
            yield row, position, reason
            return
        seen[action.kind, action.microbatch] = position
        if action.kind != "I":
            newest["F" if action.kind == "F" else "gradient"] = action.microbatch
    for i in range(microbatches):
        missing = _unfinished(i, seen, forward_only)
        if missing:
            yield row, len(actions[row]), f"{row}{missing}{i} is missing"
            return


def _fault(
    action: Action,
    row: int,
    microbatches: int,
    seen: dict[tuple[str, int], int],
    newest: dict[str, int],
    forward_only: bool,
) -> str:
    stage, kind, i = action
    if kind not in KINDS:
        return f"{kind!r} is no kind of action; the kinds are {' '.join(KINDS)}"
    if stage != row:
        return f"{action} is an action of stage {stage} in the list of stage {row}"
    if not 0 <= i < microbatches:
        return f"{action} names microbatch {i}, but there are {microbatches} (0 to {microbatches - 1})"
    if forward_only and kind != "F":
        return f"{action} is not a forward, and the schedule is to be forward only"
    if (kind, i) in seen:
        return f"{action} is done twice, first at position {seen[kind, i]}"
    if kind in "BI" and ("F", i) not in seen:
        return f"{action} comes before {stage}F{i}"
    if kind in "BI" and ("I" if kind == "B" else "B", i) in seen:
        return f"{action} repeats a backward that {stage}{'I' if kind == 'B' else 'B'}{i} has done"
    if kind == "W" and ("I", i) not in seen:
        return f"{action} comes before {stage}I{i}"
    order = "F" if kind == "F" else "gradient"
    if kind != "I" and i < newest[order]:
        return f"{action} comes after microbatch {newest[order]}; microbatches go in ascending order"
    return ""


def _unfinished(i: int, seen: dict[tuple[str, int], int], forward_only: bool) -> str:
    """The kind of action that microbatch ``i`` still lacks, or the empty string."""
    if ("F", i) not in seen:
        return "F"
    if forward_only or ("B", i) in seen or ("W", i) in seen:
        return ""
    return "W" if ("I", i) in seen else "B"
