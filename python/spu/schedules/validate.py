"""Proof that a schedule can be run: complete, in order, without deadlock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spu.schedules.actions import KINDS, Action, Actions, ScheduleError, check_counts, format_grid, stage_count

__all__ = ["find_deadlock", "marked_error", "needs", "validate"]


def validate(
    actions: Actions,
    ranks: int,
    microbatches: int,
    *,
    stage_ranks: Sequence[int] | None = None,
    forward_only: bool = False,
) -> None:
    """Check that every rank does all of its stages' work, in an order that all ranks together can run.

    On each stage every microbatch has one F, and then either one B or one I followed by one W. A stage's forwards, and
    its actions that add weight gradients (B and W), are in ascending microbatch order: the sums are then those of one
    device, bit for bit. No action waits for one that cannot come.

    Args:
        actions: one list of actions per rank.
        ranks: required number of ranks.
        microbatches: number of microbatches that each stage must process.
        stage_ranks: the rank of each stage, as `stage_ranks` gives it; by default one stage for each rank.
        forward_only: expect forwards alone, as for evaluation.

    Raises:
        ScheduleError: whose text is the reason and the grid with the first bad action marked. "First" is by position
            in the ranks' lists, then by rank.
    """
    check_counts(ranks, microbatches)
    rank_of = range(ranks) if stage_ranks is None else stage_ranks
    if len(actions) != ranks:
        raise ScheduleError(f"the schedule has {len(actions)} lists of actions for {ranks} ranks")
    faults = (fault for row in range(ranks) for fault in _row_faults(actions, row, rank_of, microbatches, forward_only))
    bad = min(faults, key=lambda fault: (fault[1], fault[0]), default=None)
    if bad is None:
        bad = find_deadlock(actions)
    if bad is not None:
        raise marked_error(actions, *bad)


def marked_error(actions: Actions, row: int, position: int, reason: str) -> ScheduleError:
    """Return the error that shows the grid with one action marked."""
    grid = format_grid(actions, mark=(row, position), note=reason)
    return ScheduleError(f"invalid schedule, rank {row}, position {position}: {reason}\n{grid}")


def needs(action: Action, stages: int) -> list[tuple[Action, ...]]:
    """Return the actions that must end before ``action`` starts: groups, one member of each is enough."""
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
    """Run the schedule without a clock; return (row, position, reason) of the first action that can never start."""
    done: set[Action] = set()
    heads = [0] * len(actions)
    stages = stage_count(actions)
    moved = True
    while moved:
        moved = False
        for index, row in enumerate(actions):
            while heads[index] < len(row) and not _missing(row[heads[index]], stages, done):
                done.add(row[heads[index]])
                heads[index] += 1
                moved = True
    stuck = [index for index, row in enumerate(actions) if heads[index] < len(row)]
    if not stuck:
        return None
    waits = []
    for index in stuck:
        action = actions[index][heads[index]]
        waits.append(f"{action} waits for {_missing(action, stages, done)}")
    first = min(stuck, key=lambda index: (heads[index], index))
    return first, heads[first], "deadlock: " + ", ".join(waits)


def _missing(action: Action, stages: int, done: set[Action]) -> str:
    for group in needs(action, stages):
        if not any(need in done for need in group):
            return str(group[0])
    return ""


class _Seen:
    """The actions of one stage so far."""

    def __init__(self) -> None:
        self.positions: dict[tuple[str, int], int] = {}  # (kind, microbatch) -> where
        self.newest = {"F": -1, "gradient": -1}  # microbatch of the last forward, and of the last B or W

    def add(self, action: Action, position: int) -> None:
        self.positions[action.kind, action.microbatch] = position
        if action.kind != "I":
            self.newest["F" if action.kind == "F" else "gradient"] = action.microbatch

    def unfinished(self, i: int, forward_only: bool) -> str:
        """Return the kind of action that microbatch ``i`` still lacks, or the empty string."""
        if ("F", i) not in self.positions:
            return "F"
        if forward_only or ("B", i) in self.positions or ("W", i) in self.positions:
            return ""
        return "W" if ("I", i) in self.positions else "B"


def _row_faults(
    actions: Actions, row: int, rank_of: Sequence[int], microbatches: int, forward_only: bool
) -> Iterator[tuple[int, int, str]]:
    """Yield the first fault in one rank's own list, as (row, position, reason)."""
    seen = {stage: _Seen() for stage, rank in enumerate(rank_of) if rank == row}
    for position, action in enumerate(actions[row]):
        if action.stage not in seen:
            own = ", ".join(map(str, seen)) or "none"
            yield row, position, f"{action} is no action of rank {row}, whose stages are: {own}"
            return
        reason = _fault(action, microbatches, seen[action.stage], forward_only)
        if reason:
            yield row, position, reason
            return
        seen[action.stage].add(action, position)
    for stage, done in seen.items():
        for i in range(microbatches):
            missing = done.unfinished(i, forward_only)
            if missing:
                yield row, len(actions[row]), f"{stage}{missing}{i} is missing"
                return


def _fault(action: Action, microbatches: int, seen: _Seen, forward_only: bool) -> str:
    stage, kind, i = action
    positions = seen.positions
    if kind not in KINDS:
        return f"{kind!r} is no kind of action; the kinds are {' '.join(KINDS)}"
    if not 0 <= i < microbatches:
        return f"{action} names microbatch {i}, but there are {microbatches} (0 to {microbatches - 1})"
    if forward_only and kind != "F":
        return f"{action} is not a forward, and the schedule is to be forward only"
    if (kind, i) in positions:
        return f"{action} is done twice, first at position {positions[kind, i]}"
    if kind in "BI" and ("F", i) not in positions:
        return f"{action} comes before {stage}F{i}"
    if kind in "BI" and ("I" if kind == "B" else "B", i) in positions:
        return f"{action} repeats a backward that {stage}{'I' if kind == 'B' else 'B'}{i} has done"
    if kind == "W" and ("I", i) not in positions:
        return f"{action} comes before {stage}I{i}"
    order = "F" if kind == "F" else "gradient"
    if kind != "I" and i < seen.newest[order]:
        return f"{action} comes after microbatch {seen.newest[order]}; microbatches go in ascending order"
    return ""
