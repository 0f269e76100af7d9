"""1F1B over several stages a rank (Narayanan et al., "Efficient Large-Scale Language Model Training", 2021)."""

from __future__ import annotations

from spu.schedules.actions import Action, check_counts, check_virtual
from spu.schedules.one_f_one_b import one_f_one_b

__all__ = ["interleaved"]


def interleaved(ranks: int, microbatches: int, *, virtual: int = 2) -> list[list[Action]]:
    """Return the interleaved 1F1B schedule: stage ``s`` is on rank ``s % ranks``, ``virtual`` stages on each.

    Ranks take groups of ``ranks`` microbatches through one of their stages before they turn to their next, so a
    microbatch needs ``1 / virtual`` of the time to reach the last rank: with equal stages the idle share is about
    ``(p - 1) / (v * m + p - 1)``, at the price of ``v`` times the transfers. Rank ``r`` holds at most
    ``2 * (p - r - 1) + (v - 1) * p + 1`` microbatches of a stage. A last group that is not full has the
    actions of a full one without the missing microbatches. With ``virtual=1`` it is 1F1B.

    Returns:
        One list of actions per rank.

    Raises:
        ValueError: for counts below 1.
    """
    check_counts(ranks, microbatches)
    check_virtual(virtual)
    if virtual == 1:
        return one_f_one_b(ranks, microbatches)
    return [_rank_actions(rank, ranks, microbatches, virtual) for rank in range(ranks)]


def _rank_actions(rank: int, ranks: int, microbatches: int, virtual: int) -> list[Action]:
    stages = range(rank, ranks * virtual, ranks)
    groups = [range(first, first + ranks) for first in range(0, microbatches, ranks)]
    forwards = [Action(stage, "F", i) for group in groups for stage in stages for i in group]
    backwards = [Action(stage, "B", i) for group in groups for stage in reversed(stages) for i in group]
    warmup = min(len(forwards), 2 * (ranks - rank - 1) + (virtual - 1) * ranks)
    row = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards):
        row += [forward, backward]
    row += backwards[len(forwards) - warmup :]
    # The last group was counted as full: an order that runs with more microbatches also runs without some of them.
    return [action for action in row if action.microbatch < microbatches]
