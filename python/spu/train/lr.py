"""The learning rate as a function of the step alone, so that a resumed run has the rates of one that never stopped."""

from __future__ import annotations

import math

__all__ = ["LR_SCHEDULES", "lr_factor"]

LR_SCHEDULES = ("cosine", "linear", "constant")


def lr_factor(step: int, steps: int, *, schedule: str = "cosine", warm: int = 0, final: float = 0.0) -> float:
    """Return the share of the peak learning rate for the update after ``step`` updates.

    It rises linearly over the first ``warm`` steps and reaches 1 with the last of them. Then it stays (constant), or
    falls to ``final`` at step ``steps``: along a straight line, or half a cosine (Loshchilov and Hutter, SGDR, 2017).

    Args:
        step: updates done, from 0.
        steps: updates of the whole run; later ones have the last share.
        schedule: one of ``LR_SCHEDULES``.
        warm: steps of the warm-up.
        final: share of the peak at the end, 0 to 1.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule not in LR_SCHEDULES:
        raise ValueError(f"unknown learning-rate schedule {schedule!r}: give one of {', '.join(LR_SCHEDULES)}")
    if step < warm:
        return (step + 1) / warm
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warm) / max(1, steps - warm))
    left = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return final + (1 - final) * left
