"""All microbatches through one layer before the next (Lamy-Poirier, "Breadth-First Pipeline Parallelism", 2022)."""

from __future__ import annotations

from spu.schedules.actions import Action, check_counts, check_virtual

__all__ = ["layer_outer", "layer_outer_bound"]


def layer_outer(ranks: int, microbatches: int, *, virtual: int = 1) -> list[list[Action]]:
    """Return the layer-outer schedule: stage ``s`` is on rank ``s % ranks``; a rank ends a stage before its next.

    A rank runs the forwards of all microbatches through its first stage, then all through its second, and so on;
    then all backwards in the reverse order of stages. A stage's weights are then needed twice a step, for any
    number of microbatches, as weights streamed from the host require. Every stage holds the activations
    of all microbatches at its peak. The idle share of equal stages is ``(p - 1) / (v * m + p - 1)`` for ``m >= p``.

    Returns:
        One list of actions per rank.

    Raises:
        ValueError: for counts below 1.
    """
    check_counts(ranks, microbatches)
    check_virtual(virtual)
    rows = []
    for rank in range(ranks):
        stages = range(rank, ranks * virtual, ranks)
        forwards = [Action(stage, "F", i) for stage in stages for i in range(microbatches)]
        rows.append(forwards + [Action(stage, "B", i) for stage in reversed(stages) for i in range(microbatches)])
    return rows


def layer_outer_bound(ranks: int, microbatches: int, virtual: int) -> list[int]:
    """Return the most microbatches of a stage that each rank holds, over all of its stages."""
    return [microbatches * virtual] * ranks
