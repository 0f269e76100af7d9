"""Making a plan for given settings: layers are placed on devices under their budgets, or it is said why not."""

from __future__ import annotations

from collections.abc import Sequence

from spu.plan.layer_cost import LayerCost
from spu.plan.machine import Machine
from spu.plan.memory import ITEM_BYTES
from spu.plan.partition import check_stages
from spu.plan.plan import CODECS, Plan
from spu.plan.refusal import refusal
from spu.plan.request import Request
from spu.settings import Settings

__all__ = ["make_plan", "plain_loss"]


def make_plan(
    layer_costs: Sequence[LayerCost],
    machine: Machine,
    settings: Settings,
    *,
    loss_cost: LayerCost | None = None,
    codecs: Sequence[str] | None = None,
    model: str = "",
    times: Sequence[Sequence[tuple[float, float]]] | None = None,
    layers: Sequence[Sequence[int]] | None = None,
    max_microbatches: int | None = None,
    rows: int = 0,
    tokens: int = 0,
) -> Plan:
    """Place layers on devices, in order, so that the slowest stage is as fast as the budgets allow.

    Args:
        layer_costs: one entry per layer, for one microbatch, in the precision of the training.
        machine: the devices in pipeline order, and their speeds.
        settings: of the training, with a schedule and a number of microbatches.
        loss_cost: of the loss; default: a cross entropy over the last layer's output.
        codecs: "none" or a codec for each boundary; default: what the settings say, for all of them.
        model: a name for the plan.
        times: measured (forward, backward) seconds of every layer, and last of the loss, on every device; default:
            counted work at the machine's speeds.
        layers: (first, last + 1) per stage, if the boundaries are given and only to be checked and predicted.
        max_microbatches: the batch cannot be cut into more; limits what a refusal proposes.
        rows, tokens: of a microbatch, to be noted in the plan.

    Returns:
        The plan, every device of which is within its budget.

    Raises:
        BudgetError: no partition fits; says which budget is short by how many bytes, and what was tried and fits.
        ValueError: for more stages than layers, or arguments that make no sense.
    """
    if settings.searched:
        raise ValueError(
            "a plan is made for a schedule and a number of microbatches; spu.plan.search finds what is auto"
        )
    count, stages = len(layer_costs), len(machine.devices) * settings.stages_per_rank
    check_stages(count, stages)
    settings.recompute.check_within(count)
    request = Request(
        machine=machine,
        order=tuple(range(len(machine.devices))),
        layers=tuple(layer_costs),
        loss=plain_loss(layer_costs[-1], settings.precision) if loss_cost is None else loss_cost,
        measured=times,
        settings=settings,
        codecs=_checked_codecs((settings.codec,) * (stages - 1) if codecs is None else codecs, stages),
        fixed=None if layers is None else _checked_layers(layers, count, stages),
    )
    found = request.candidates()
    if not found:
        raise refusal(request, max_microbatches)
    return found[0].plan(model=model, rows=rows, tokens=tokens)


def plain_loss(last: LayerCost, precision: str) -> LayerCost:
    """Return the cost of a cross entropy that was not counted: an fp32 log-softmax in place of the last output."""
    log_softmax = last.output_bytes // ITEM_BYTES[precision] * 4
    return LayerCost(
        name="loss",
        own_bytes=log_softmax,
        input_bytes=last.output_bytes,
        output_bytes=4,
        backward_extra_bytes=log_softmax,
    )


def _checked_codecs(codecs: Sequence[str], stages: int) -> tuple[str, ...]:
    for name in codecs:
        if name not in CODECS:
            raise ValueError(f"codecs must be of {', '.join(map(repr, CODECS))}, got {name!r}")
    if len(codecs) != stages - 1:
        raise ValueError(f"codecs must have one name per boundary, {stages - 1}, got {len(codecs)}")
    return tuple(codecs)


def _checked_layers(layers: Sequence[Sequence[int]], count: int, stages: int) -> tuple[range, ...]:
    parts = tuple(range(first, stop) for first, stop in layers)
    ends = [0, *(part.stop for part in parts)]
    if len(parts) != stages or not all(parts) or ends[:-1] != [p.start for p in parts] or ends[-1] != count:
        pairs = [(part.start, part.stop) for part in parts]
        raise ValueError(f"layers must be {stages} consecutive (first, last + 1) pairs from 0 to {count}, got {pairs}")
    return parts
