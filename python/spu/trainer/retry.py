"""What takes less memory than a plan whose step has run out of it: the next notch down.

In this order, so that the trajectory changes as little as possible: recompute every layer; where there is a tier below,
let the inputs of layers wait there, or stream the layers from it. None of them changes a bit. Then smaller microbatches
of the same batch, whose gradients are the same sum in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spu.common.errors import first_line
from spu.common.out_of_memory import is_out_of_memory
from spu.engine.attempt import Attempt
from spu.engine.microbatch import batch_rows
from spu.memory.store import StoreError
from spu.plan import Plan, make_plan
from spu.plan.check import check_fits
from spu.plan.make import plain_loss
from spu.plan.make_streaming import predict_streaming
from spu.settings import AUTO, Recompute
from spu.trainer.planner import Planner, counted_machine, tokens_of

__all__ = ["Lower", "lower", "with_advice"]

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


def lower(
    planner: Planner, plan: Plan, rows: int, attempt: Attempt, take: Callable[[Plan], None], *, batch_is_cut: bool
) -> Lower:
    """Take the next notch below a plan, and return it.

    Args:
        planner: of the batch that did not fit.
        plan: which its step ran by.
        rows: of the batch.
        attempt: what is known of what the layers do to their state.
        take: lets the training go on by a plan, or raises and leaves it as it was.
        batch_is_cut: the user lets batches be cut into microbatches.
    """
    advice: list[str] = []
    for label, means, why_not, changed in _notches(planner, plan, rows, attempt, batch_is_cut):
        if why_not:
            advice.append(f"{label}: {why_not}")
            continue
        try:
            lowered = _lowered(planner, plan, **changed)
            take(lowered)
            return Lower(lowered, label, means, tuple(advice))
        except Exception as error:
            if not isinstance(error, ValueError | StoreError) and not is_out_of_memory(error):
                raise
            advice.append(f"{label}: {first_line(error)}")
    return Lower(None, advice=tuple(advice))


def _notches(
    planner: Planner, plan: Plan, rows: int, attempt: Attempt, batch_is_cut: bool
) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield (label, what it means, why it may not be done or nothing, arguments of `_lowered`)."""
    if len(plan.recomputed_layers) < len(planner.layers):
        mode = planner.settings.recompute.mode
        asked = "" if mode == AUTO else f"the trainer was told to recompute {planner.settings.recompute}"
        yield "recompute=True", SAME_BITS, asked, {"recompute": True}
    yield from _tiers(planner, plan)
    count, runs = plan.settings.run_microbatches, plan.settings.accumulate
    more = min(2 * count, rows // runs)
    if more > count and -(-rows // (more * runs)) < -(-rows // (count * runs)):
        why_not = ""
        if not batch_is_cut:
            why_not = "with microbatches=1 rows may act on each other; if they do not"
        elif attempt.normalizes_batches():
            why_not = "a batch norm would see fewer rows at a time"
        elif attempt.changes_buffers:
            why_not = "a layer changes a buffer in its forward, which then has other values"
        yield f"microbatches={more}", OTHER_ORDER, why_not, {"microbatches": more}


def _tiers(planner: Planner, plan: Plan) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield the notches that use the tiers below, as `_notches`."""
    wanted = planner.settings
    if plan.streaming is not None and plan.streaming.activations == "keep":
        asked = "" if wanted.activations == AUTO else "the trainer was told to keep activations on the device"
        yield 'activations="exact"', SAME_BITS, asked, {"activations": "exact"}
    if plan.streaming is None and planner.can_stream:
        asked = "" if wanted.residency == AUTO else f"the trainer was told that layers are {wanted.residency}"
        yield 'residency="streamed"', SAME_BITS, asked, {"residency": "streamed"}


def _lowered(
    planner: Planner,
    plan: Plan,
    *,
    recompute: bool | None = None,
    activations: str | None = None,
    residency: str | None = None,
    microbatches: int | None = None,
) -> Plan:
    """Return a plan with one thing changed, from counted costs; its stages are the same, except with a residency.

    Raises:
        BudgetError, ValueError: it does not fit the budgets, or the schedule or the batch does not allow it.
    """
    if residency is not None:
        return planner.streamed(replace(plan.settings, residency=residency))
    settings = replace(plan.settings, microbatches=microbatches or plan.settings.microbatches)
    layers = frozenset(range(len(planner.layers))) if recompute else plan.recomputed_layers
    kept = replace(settings, recompute=Recompute("all")) if recompute else settings
    sample, _ = planner.sample(settings.parts)
    costs, loss = planner.costs(settings.parts)
    machine = counted_machine(planner.devices, settings.precision)
    rows, tokens = batch_rows(sample), tokens_of(sample)
    if plan.streaming is not None:
        stages = [replace(s, recompute=tuple(k for k in range(*s.layers) if k in layers)) for s in plan.stages]
        streaming = replace(plan.streaming, activations=activations or plan.streaming.activations)
        asked = replace(plan, settings=settings, stages=tuple(stages), rows=rows, tokens=tokens, streaming=streaming)
        loss = plain_loss(costs[-1], settings.precision) if loss is None else loss
        made = predict_streaming(asked, costs, loss, machine, planner.tiers)
        check_fits(made, planner.devices, rows, tokens, planner.tiers)
    else:
        made = make_plan(
            costs,
            machine,
            replace(settings, recompute=Recompute("given", layers)),
            loss_cost=loss,
            codecs=plan.codecs,
            model=plan.model,
            layers=[stage.layers for stage in plan.stages],
            rows=rows,
            tokens=tokens,
        )
    made.actions()  # a schedule may need a certain number of microbatches
    return replace(made, settings=kept)


def with_advice(failure: Exception, advice: Sequence[str]) -> Exception:
    """Return the failure, with what would help at the end of its message."""
    failure.args = ("\n  ".join([str(failure) or type(failure).__name__, "what would help:", *advice]),)
    return failure
