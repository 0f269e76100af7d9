"""One forward, one backward (Narayanan et al., "PipeDream-Flush", 2021)."""

from __future__ import annotations

from spu.schedules.actions import Action, check_counts


def one_f_one_b(stages: int, microbatches: int) -> list[list[Action]]:
    """The 1F1B schedule: a few forwards to fill the pipeline, then forward and backward in turn, then what is left.

    Stage ``s`` of ``p`` holds the activations of at most ``min(m, p - s)`` microbatches, whereas GPipe holds ``m``;
    with equal stages the idle share is GPipe's, ``(p - 1) / (m + p - 1)``. Backwards run in ascending order.

    Returns:
        One list of actions per stage.
    """
    check_counts(stages, microbatches)
    return [_stage_actions(stage, stages, microbatches) for stage in range(stages)]


def _stage_actions(stage: int, stages: int, microbatches: int) -> list[Action]:
    warmup = min(microbatches, stages - 1 - stage)
    row = [Action(stage, "F", i) for i in range(warmup)]
    for i in range(microbatches - warmup):
        row += [Action(stage, "F", warmup + i), Action(stage, "B", i)]
    row += [Action(stage, "B", i) for i in range(microbatches - warmup, microbatches)]
    return row
