"""All microbatches through one layer before the next (Lamy-Poirier, "Breadth-First Pipeline Parallelism", 2022)."""

from __future__ import annotations

from spu.schedules.actions import Action, check_counts, check_virtual

__all__ = ["layer_outer"]


def layer_outer(ranks: int, microbatches: int, *, virtual: int = 1) -> list[list[Action]]:
    """Return the layer-outer schedule: stage ``s`` is on rank ``s % ranks``; a rank ends a stage before its next.

    A rank runs the forwards of all microbatches through its first stage, then all through its second, and so on;
    then all backwards in the reverse order of stages. The last stage alternates: a microbatch's backward follows its
    forward, so that logits and what the loss keeps are there for one microbatch at a time. A stage's weights are then
    needed twice a step, the last one's once, for any number of microbatches, as weights streamed from the host require:
    a rank's consecutive actions of one stage, forwards and backwards, are one visit. Every other stage holds the
    activations of all microbatches at its peak. The idle share of equal stages is ``(p - 1) / (v * m + p - 1)`` for
    ``m >= p``.

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
        stages, last = (stages[:-1], stages[-1:]) if rank == ranks - 1 else (stages, stages[:0])
        row = [Action(stage, "F", i) for stage in stages for i in range(microbatches)]
        row += [Action(stage, kind, i) for stage in last for i in range(microbatches) for kind in "FB"]
        rows.append(row + [Action(stage, "B", i) for stage in reversed(stages) for i in range(microbatches)])
    return rows
