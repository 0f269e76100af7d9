"""Schedules that split the backward, so that weight gradients fill the bubble (Qi et al., "Zero Bubble", 2023).

The rank before waits for ``I`` (the gradient of a stage's input). ``W`` (the gradient of its weights) can run at any
time after, and runs when a rank would otherwise wait.
"""

from __future__ import annotations

import itertools

from spu.schedules.actions import Action, check_counts, one_stage_each

__all__ = ["zb", "zbv"]


def zb(ranks: int, microbatches: int, *, virtual: int = 1) -> list[list[Action]]:
    """Return the ZB-H1 schedule: 1F1B with W deferred, holding at most as much as 1F1B's first rank.

    Every rank holds at most ``min(m, p)`` microbatches between F and W. With equal stages in which F, I and W take the
    same time, the idle share is ``(p - 1) / (3 * m + p - 1)``, a third of 1F1B's, for ``m >= p``.

    Returns:
        One list of actions per rank; each rank is one stage.

    Raises:
        ValueError: for counts below 1, or ``virtual`` other than 1.
    """
    check_counts(ranks, microbatches)
    one_stage_each("zb", virtual)
    return [_zb_actions(rank, ranks, microbatches) for rank in range(ranks)]


def _zb_actions(stage: int, ranks: int, microbatches: int) -> list[Action]:
    warmup = min(microbatches, ranks - 1 - stage)
    row = [Action(stage, "F", i) for i in range(warmup)]
    for i in range(microbatches):
        if warmup + i < microbatches:
            row.append(Action(stage, "F", warmup + i))
        row.append(Action(stage, "I", i))
        if i >= stage:  # W lags the more, the fewer forwards a stage has had to begin with
            row.append(Action(stage, "W", i - stage))
    return row + [Action(stage, "W", i) for i in range(max(0, microbatches - stage), microbatches)]


def zbv(ranks: int, microbatches: int, *, virtual: int = 2) -> list[list[Action]]:
    """Return the ZB-V schedule: stages go down the ranks and back up (Qi et al., "Controllable Memory", 2024).

    Rank ``r`` of ``p`` has the stages ``r`` and ``2 * p - 1 - r``: the first rank also has the last stage, so that
    backwards begin where forwards did. Every rank holds at most ``min(2 * m, 2 * p)`` microbatches of a stage (half a
    rank's layers each), as much as 1F1B's first rank. With equal stages in which F, I and W take the same time, the
    idle share is ``(p - 1) / (6 * m + p - 1)``, for ``m >= 2 * p``.

    Returns:
        One list of actions per rank.

    Raises:
        ValueError: for counts below 1, or ``virtual`` other than 2.
    """
    check_counts(ranks, microbatches)
    if virtual != 2:
        raise ValueError(f"schedule 'zbv' has two stages on each rank: pass virtual=2, got {virtual!r}")
    return [_zbv_actions(rank, ranks, microbatches) for rank in range(ranks)]


def _zbv_actions(rank: int, ranks: int, microbatches: int) -> list[Action]:
    down, up = rank, 2 * ranks - 1 - rank
    forward, back = [(down, "F")], [(up, "F")]
    down_backward, up_backward = [(down, "I"), (down, "W")], [(up, "I"), (up, "W")]
    count = max(microbatches, 2 * ranks)
    work = [
        *forward * (2 * (ranks - rank) - 1),  # until the first microbatch comes back up
        *(back + forward) * rank,
        *(back + up_backward) * (ranks - rank),
        *(forward + down_backward + back + up_backward) * (count - ranks),
        *[(down, "I"), (up, "I")] * rank,  # the last I's, which other ranks wait for; their W's come at the end
        *down_backward * (ranks - rank),
        *[(up, "W")] * rank,
        *[(down, "W")] * rank,
    ]
    numbers = {(stage, kind): itertools.count() for stage in (down, up) for kind in "FIW"}
    row = (Action(stage, kind, next(numbers[stage, kind])) for stage, kind in work)
    # An order that runs with more microbatches also runs without some of them.
    return [action for action in row if action.microbatch < microbatches]
