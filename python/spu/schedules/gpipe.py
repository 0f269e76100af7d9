"""All forwards, then all backwards (Huang et al., "GPipe", 2019)."""

from __future__ import annotations

from spu.schedules.actions import Action, check_counts


def gpipe(stages: int, microbatches: int) -> list[list[Action]]:
    """The GPipe schedule: every stage runs all its forwards, then all its backwards.

    Backwards run in ascending microbatch order, not in GPipe's descending one, so that weight gradients are summed in
    the order in which one device would sum them; the makespan is the same. Every stage holds the activations of all
    microbatches at its peak. With equal stages the idle share is ``(p - 1) / (m + p - 1)``.

    Returns:
        One list of actions per stage.
    """
    check_counts(stages, microbatches)
    return [[Action(stage, kind, i) for kind in "FB" for i in range(microbatches)] for stage in range(stages)]


def forward_only(stages: int, microbatches: int) -> list[list[Action]]:
    """Only the forwards, in ascending microbatch order: evaluation."""
    check_counts(stages, microbatches)
    return [[Action(stage, "F", i) for i in range(microbatches)] for stage in range(stages)]
