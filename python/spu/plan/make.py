"""Makes a plan for given settings: places layers on devices under their budgets; or says why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spu import schedules
from spu.plan.layer_cost import LayerCost
from spu.plan.machine import Machine
from spu.plan.memory import ITEM_BYTES, wire_bytes
from spu.plan.partition import check_stages
from spu.plan.plan import CODECS, Plan, Predicted, StagePlan
from spu.plan.refusal import refusal
from spu.plan.request import Placement, Request
from spu.settings import Settings

__all__ = ["make_plan", "with_bases", "write_plan"]


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
    """Places layers on devices, in order, so that the slowest stage is as fast as the budgets allow.

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
    order = range(len(machine.devices))
    stages = len(order) * settings.stages_per_rank
    check_stages(len(layer_costs), stages)
    settings.recompute.check_within(len(layer_costs))
    request = Request.on(
        machine,
        order,
        layer_costs,
        _plain_loss(layer_costs[-1], ITEM_BYTES[settings.precision]) if loss_cost is None else loss_cost,
        times,
        settings,
        _codecs(settings.codec if codecs is None else codecs, stages),
        None if layers is None else _fixed(layers, len(layer_costs), stages),
    )
    found = request.candidates()
    if not found:
        raise refusal(request, max_microbatches)
    basis = machine.basis(device.name for device in machine.devices) if times is None else "measured"
    plan = write_plan(request, found[0], model=model, basis=basis, rows=rows, tokens=tokens)
    return with_bases(plan, layer_costs, loss_cost)


def with_bases(plan: Plan, layer_costs: Sequence[LayerCost], loss_cost: LayerCost | None) -> Plan:
    """The plan with a note of the layers, or the loss, whose needs were not counted."""
    costs = [*layer_costs, *([] if loss_cost is None else [loss_cost])]
    return replace(plan, uncounted=tuple((cost.name, cost.basis) for cost in costs if cost.basis != "counted"))


def write_plan(request: Request, placed: Placement, *, model: str, basis: str, rows: int = 0, tokens: int = 0) -> Plan:
    """The plan of a placement, with everything predicted."""
    durations, updates = request.durations(placed), request.updates(placed)
    held, saved = request.held(placed), request.saved(placed)
    totals = [
        replace(total, saved_bytes=own, workspace_bytes=one.most - one.each)
        for total, own, one in zip(request.stage_bytes(placed), saved, held)
    ]
    stages = []
    for s, (part, recomputed) in enumerate(zip(placed.parts, placed.recomputed, strict=True)):
        device = request.devices[request.homes[s]]
        forward_s, input_s, weight_s = durations[s]
        stages.append(
            StagePlan(
                **vars(totals[s]),
                device=device.name,
                layers=(part.start, part.stop),
                layer_names=tuple(request.layers[k].name for k in part),
                recompute=recomputed,
                budget_bytes=device.budget_bytes,
                each_bytes=held[s].each,
                left_bytes=held[s].left,
                forward_s=forward_s,
                backward_s=input_s + weight_s,
                weight_s=weight_s,
                update_s=updates[s],
            )
        )
    timeline = schedules.simulate(request.actions, durations, request.transfers(placed))
    update_s = max(sum(u for u, home in zip(updates, request.homes) if home == r) for r in range(len(request.devices)))
    crossing = [
        wire_bytes(request.layers[part.stop - 1].output_bytes, request.settings.precision, codec)
        if boundary.copied
        else 0
        for part, codec, boundary in zip(placed.parts, request.codecs, request.boundaries)
    ]
    return Plan(
        model=model,
        settings=Settings.part_of(request.settings),
        rows=rows,
        tokens=tokens,
        codecs=request.codecs,
        stages=tuple(stages),
        predicted=Predicted(
            step_s=request.settings.accumulate * timeline.makespan + update_s,
            update_s=update_s,
            idle_share=timeline.idle_share,
            transfer_s=tuple(request.transfers(placed)),
            link_bytes=tuple(2 * request.settings.parts * size for size in crossing),
            peak_bytes=tuple(request.predicted_peaks(placed)),
            basis=basis,
        ),
    )


def _plain_loss(last: LayerCost, item_bytes: int) -> LayerCost:
    """Cross entropy where the loss was not counted: an fp32 log-softmax in place of the last output."""
    log_softmax = last.output_bytes // item_bytes * 4
    return LayerCost(
        name="loss",
        own_bytes=log_softmax,
        input_bytes=last.output_bytes,
        output_bytes=4,
        backward_extra_bytes=log_softmax,
    )


def _codecs(codec: str | Sequence[str], stages: int) -> tuple[str, ...]:
    codecs = (codec,) * (stages - 1) if isinstance(codec, str) else tuple(codec)
    for name in codecs:
        if name not in CODECS:
            raise ValueError(f"codecs must be of {', '.join(map(repr, CODECS))}, got {name!r}")
    if len(codecs) != stages - 1:
        raise ValueError(f"codecs must have one name per boundary, {stages - 1}, got {len(codecs)}")
    return codecs


def _fixed(layers: Sequence[Sequence[int]], count: int, stages: int) -> tuple[range, ...]:
    parts = tuple(range(first, stop) for first, stop in layers)
    ends = [0, *(part.stop for part in parts)]
    if len(parts) != stages or not all(parts) or ends[:-1] != [p.start for p in parts] or ends[-1] != count:
        pairs = [(part.start, part.stop) for part in parts]
        raise ValueError(f"layers must be {stages} consecutive (first, last + 1) pairs from 0 to {count}, got {pairs}")
    return parts
