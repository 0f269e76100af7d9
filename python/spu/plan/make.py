"""Makes a plan for given settings: places layers on devices under their budgets; or says why not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from spu import schedules
from spu.cost.layer_cost import LayerCost
from spu.plan.memory import ITEM_BYTES, wire_bytes
from spu.plan.partition import check_stages
from spu.plan.plan import CODECS, Plan, Predicted, StagePlan
from spu.plan.refuse import refusal
from spu.plan.request import Placed, Request, Speed, Times
from spu.settings import Recompute, Settings

if TYPE_CHECKING:
    from spu.devices import Device

NOMINAL_FLOPS_PER_S = 5e10
"""Speed assumed of every device where neither layers nor devices were measured; such plans say "nominal"."""


def make_plan(
    layer_costs: Sequence[LayerCost],
    devices: Sequence[Device],
    settings: Settings,
    *,
    loss_cost: LayerCost | None = None,
    codecs: Sequence[str] | None = None,
    model: str = "",
    times: Sequence[Sequence[tuple[float, float]]] | None = None,
    speeds: Sequence[float] | None = None,
    bandwidths: Sequence[float] | None = None,
    update_rates: Sequence[float] | None = None,
    pack_rates: Sequence[float] | None = None,
    links: Sequence[float] | None = None,
    layers: Sequence[Sequence[int]] | None = None,
    max_microbatches: int | None = None,
    rows: int = 0,
    tokens: int = 0,
    basis: str = "",
) -> Plan:
    """Places layers on devices, in order, so that the slowest stage is as fast as the budgets allow.

    Args:
        layer_costs: one entry per layer, for one microbatch, in the precision of the training.
        devices: in pipeline order.
        settings: of the training, with a schedule and a number of microbatches.
        loss_cost: of the loss; default: a cross entropy over the last layer's output.
        codecs: "none" or a codec for each boundary; default: what the settings say, for all of them.
        model: a name for the plan.
        times: measured (forward, backward) seconds of every layer, and last of the loss, on every device.
        speeds: FLOP/s of each device, at which counted work is done where ``times`` are not given; default: all alike.
        bandwidths: bytes/s of each device's memory, at which counted traffic moves then; default: it is free.
        update_rates: bytes/s of each device in the update; default: the update takes no time.
        pack_rates: bytes/s of each device in pack and unpack; default: they take no time.
        links: bytes per second over each boundary; by default transfers take no time.
        layers: (first, last + 1) per stage, if the boundaries are given and only to be checked and predicted.
        max_microbatches: the batch cannot be cut into more; limits what a refusal proposes.
        rows, tokens: of a microbatch, to be noted in the plan.
        basis: what the times rest on, to be noted in the plan; default: what the arguments say.

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
    each = settings.stages_per_rank
    ranks = len(devices)
    stages = ranks * each
    check_stages(len(layer_costs), stages)
    _check_recomputed(settings.recompute, len(layer_costs))
    loss = _plain_loss(layer_costs[-1], ITEM_BYTES[settings.precision]) if loss_cost is None else loss_cost
    counted = _counted_times([*layer_costs, loss], ranks, speeds, bandwidths)
    own_basis = "measured" if times is not None else "estimated" if speeds is not None else "nominal"
    request = Request(
        layers=tuple(layer_costs),
        loss=loss,
        times=counted if times is None else tuple(tuple(row) for row in times),
        devices=tuple(devices),
        speeds=_speeds(update_rates, pack_rates, ranks),
        settings=settings,
        codecs=_codecs(settings.codec if codecs is None else codecs, stages),
        links=_links(links, stages),
        fixed=None if layers is None else _fixed(layers, len(layer_costs), stages),
    )
    found = request.candidates()
    if not found:
        raise refusal(request, max_microbatches)
    plan = write_plan(request, found[0], model=model, basis=basis or own_basis, rows=rows, tokens=tokens)
    return with_bases(plan, layer_costs, loss_cost)


def with_bases(plan: Plan, layer_costs: Sequence[LayerCost], loss_cost: LayerCost | None) -> Plan:
    """The plan with a note of the layers, or the loss, whose needs were not counted."""
    costs = [*layer_costs, *([] if loss_cost is None else [loss_cost])]
    return replace(plan, uncounted=tuple((cost.name, cost.basis) for cost in costs if cost.basis != "counted"))


def write_plan(request: Request, placed: Placed, *, model: str, basis: str, rows: int = 0, tokens: int = 0) -> Plan:
    """The plan of a placement, with everything predicted."""
    durations, updates = request.durations(placed), request.updates(placed)
    held, saved = request.held(placed), request.saved(placed)
    totals = [
        replace(total, saved_bytes=own, workspace_bytes=one.most - one.each)
        for total, own, one in zip(request.stage_bytes(placed), saved, held)
    ]
    stages = []
    for s, (part, again) in enumerate(zip(placed.parts, placed.again, strict=True)):
        device = request.devices[request.homes[s]]
        forward_s, input_s, weight_s = durations[s]
        stages.append(
            StagePlan(
                **vars(totals[s]),
                device=device.name,
                layers=(part.start, part.stop),
                layer_names=tuple(request.layers[k].name for k in part),
                recompute=again,
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


def _counted_times(
    costs: Sequence[LayerCost], ranks: int, speeds: Sequence[float] | None, bandwidths: Sequence[float] | None
) -> tuple[Times, ...]:
    """Seconds of every layer and the loss on each of the ranks, from counted work."""
    if speeds is not None and (len(speeds) != ranks or min(speeds) <= 0):
        raise ValueError(f"speeds must have one FLOP/s above 0 per device, {ranks}, got {list(speeds)}")
    free: list[float | None] = [None] * ranks
    rates = list(zip(speeds or [NOMINAL_FLOPS_PER_S] * ranks, bandwidths or free, strict=True))
    return tuple(tuple(cost.seconds(*rate) for cost in costs) for rate in rates)


def _speeds(updates: Sequence[float] | None, packs: Sequence[float] | None, ranks: int) -> tuple[Speed, ...]:
    for name, values in (("update_rates", updates), ("pack_rates", packs)):
        if values is not None and (len(values) != ranks or min(values) <= 0):
            raise ValueError(f"{name} must have one rate above 0 per device, {ranks}, got {list(values)}")
    unknown = [math.inf] * ranks
    return tuple(Speed(update, pack) for update, pack in zip(updates or unknown, packs or unknown, strict=True))


def _check_recomputed(recompute: Recompute, count: int) -> None:
    if recompute.layers and max(recompute.layers) >= count:
        raise ValueError(f"recompute names layer {max(recompute.layers)}, but there are layers 0 to {count - 1}")


def _links(links: Sequence[float] | None, stages: int) -> tuple[float, ...]:
    if links is None:
        return (float("inf"),) * (stages - 1)
    if len(links) < stages - 1 or any(rate <= 0 for rate in links):
        raise ValueError(f"links must have one rate above 0 per boundary, {stages - 1}, got {list(links)}")
    return tuple(links[: stages - 1])


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
