"""One forward, one backward (Narayanan et al., "PipeDream-Flush", 2021)."""

from __future__ import annotations

from spu.schedules.actions import Action, check_counts, one_stage_each

__all__ = ["one_f_one_b"]


def one_f_one_b(ranks: int, microbatches: int, *, virtual: int = 1) -> list[list[Action]]:
    """Return the 1F1B schedule: forwards to fill the pipeline, forward and backward in turn, the last backwards.

    Rank ``r`` of ``p`` holds the activations of at most ``min(m, p - r)`` microbatches, whereas GPipe holds ``m``;
    with equal stages the idle share is GPipe's, ``(p - 1) / (m + p - 1)``. Backwards run in ascending order.

    Returns:
        One list of actions per rank; each rank is one stage.

    Raises:
        ValueError: for counts below 1, or ``virtual`` other than 1.
    """
    check_counts(ranks, microbatches)
    one_stage_each("1f1b", virtual)
    return [_rank_actions(rank, ranks, microbatches) for rank in range(ranks)]


def _rank_actions(stage: int, ranks: int, microbatches: int) -> list[Action]:
    warmup = min(microbatches, ranks - 1 - stage)
    row = [Action(stage, "F", i) for i in range(warmup)]
    for i in range(microbatches - warmup):
        row += [Action(stage, "F", warmup + i), Action(stage, "B", i)]
    row += [Action(stage, "B", i) for i in range(microbatches - warmup, microbatches)]
    return row
