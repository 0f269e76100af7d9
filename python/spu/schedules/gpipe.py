"""All forwards, then all backwards (Huang et al., "GPipe", 2019)."""

from __future__ import annotations

from collections.abc import Sequence

from spu.schedules.actions import Action, check_counts, one_stage_each

__all__ = ["forward_only", "gpipe"]


def gpipe(ranks: int, microbatches: int, *, virtual: int = 1) -> list[list[Action]]:
    """Return the GPipe schedule: every stage runs all its forwards, then all its backwards.

    Backwards run in ascending microbatch order, not in GPipe's descending one, so that weight gradients are summed in
    the order in which one device would sum them; the makespan is the same. Every stage holds the activations of all
    microbatches at its peak. With equal stages the idle share is ``(p - 1) / (m + p - 1)``.

    Returns:
        One list of actions per rank; each rank is one stage.

    Raises:
        ValueError: for counts below 1, or ``virtual`` other than 1.
    """
    check_counts(ranks, microbatches)
    one_stage_each("gpipe", virtual)
    return [[Action(rank, kind, i) for kind in "FB" for i in range(microbatches)] for rank in range(ranks)]


def forward_only(
    ranks: int, microbatches: int, *, stage_ranks: Sequence[int] | None = None, together: int | None = None
) -> list[list[Action]]:
    """Return a schedule of forwards only, for evaluation.

    Args:
        ranks: number of devices that work side by side.
        microbatches: number of microbatches that each stage runs, in ascending order.
        stage_ranks: the rank of each stage, by default one stage for each rank.
        together: how many microbatches a rank with several stages takes through one of them before it turns to its
            next; by default ``ranks``, so that all ranks stay busy and few outputs wait.

    Returns:
        One list of actions per rank.
    """
    check_counts(ranks, microbatches)
    rank_of = list(range(ranks)) if stage_ranks is None else list(stage_ranks)
    size = ranks if together is None else together
    groups = [range(first, min(first + size, microbatches)) for first in range(0, microbatches, size)]
    return [
        [Action(stage, "F", i) for group in groups for stage, own in enumerate(rank_of) if own == rank for i in group]
        for rank in range(ranks)
    ]
