"""What takes less memory than a plan whose step has run out of it: the next notch down.

In this order, so that the trajectory changes as little as possible: recompute every layer, which changes no bit; then
smaller microbatches of the same batch, whose gradients are the same sum in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from spu.engine.attempt import Attempt
from spu.plan import Plan
from spu.settings import AUTO
from spu.trainer.planner import Planner

__all__ = ["Lower", "lower"]

SAME_BITS = "No bit of the training changes."
OTHER_ORDER = (
    "The batch and its loss are the same; gradients are summed over smaller microbatches, so they differ by the "
    "rounding of sums, and layers with random draws (dropout) draw for each microbatch anew."
)


@dataclass(frozen=True)
class Lower:
    """The result of looking for a plan that takes less.

    Attributes:
        plan: the plan; None if there is none that may be taken.
        label: what is changed, as the trainer's keyword.
        means: what that means for the training.
        advice: what might help and was not done, and why.
    """

    plan: Plan | None
    label: str = ""
    means: str = ""
    advice: tuple[str, ...] = ()


def lower(planner: Planner, plan: Plan, rows: int, attempt: Attempt, *, batch_is_cut: bool) -> Lower:
    """Return the next notch below a plan.

    Args:
        planner: of the batch that did not fit.
        plan: which its step ran by.
        rows: of the batch.
        attempt: what is known of what the layers do to their state.
        batch_is_cut: the user lets batches be cut into microbatches.
    """
    advice: list[str] = []
    for label, means, why_not, changed in _notches(planner, plan, rows, attempt, batch_is_cut):
        if why_not:
            advice.append(f"{label}: {why_not}")
            continue
        try:
            return Lower(planner.lowered(plan, **changed), label, means, tuple(advice))
        except ValueError as error:  # BudgetError is one
            advice.append(f"{label}: {str(error).splitlines()[0]}")
    return Lower(None, advice=tuple(advice))


def _notches(
    planner: Planner, plan: Plan, rows: int, attempt: Attempt, batch_is_cut: bool
) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield (label, what it means, why it may not be done or nothing, arguments of `Planner.lowered`)."""
    parked = plan.streaming is not None and plan.streaming.activations != "keep"
    in_store = "the tier below has regions for the present microbatches; give it to a new trainer" if parked else ""
    if len(plan.recomputed_layers) < len(planner.layers):
        mode = planner.settings.recompute.mode
        asked = "" if mode == AUTO else f"the trainer was told to recompute {planner.settings.recompute}"
        yield "recompute=True", SAME_BITS, asked or in_store, {"recompute": True}
    count, runs = plan.settings.run_microbatches, plan.settings.accumulate
    more = min(2 * count, rows // runs)
    if more > count and -(-rows // (more * runs)) < -(-rows // (count * runs)):
        why_not = in_store
        if not batch_is_cut:
            why_not = "with microbatches=1 rows may act on each other; if they do not"
        elif attempt.normalizes_batches():
            why_not = "a batch norm would see fewer rows at a time"
        elif attempt.changes_buffers:
            why_not = "a layer changes a buffer in its forward, which then has other values"
        yield f"microbatches={more}", OTHER_ORDER, why_not, {"microbatches": more}
