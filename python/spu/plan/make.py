"""Makes a plan: places layers on devices under their budgets, and predicts what a step takes; or says why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate as running_sum
from typing import TYPE_CHECKING

from spu import schedules
from spu.plan.memory import ITEM_BYTES, LayerNeeds, StageMemory, wire_bytes
from spu.plan.partition import BudgetError, check_stages, fastest, shortage, shortage_of
from spu.plan.plan import CODECS, Plan, Predicted, StagePlan
from spu.plan.units import format_bytes

if TYPE_CHECKING:
    from spu.devices import Device
    from spu.profile import LayerCost

NOMINAL_FLOPS_PER_S = 5e10
"""Speed assumed of every device where neither layers nor devices were measured; such plans say "nominal"."""


@dataclass(frozen=True)
class _Request:
    """Everything that decides a plan."""

    layers: tuple[LayerNeeds, ...]
    devices: tuple[Device, ...]  # one per stage
    slowness: tuple[float, ...]  # [stages] what the layers' seconds are multiplied by
    schedule: str
    microbatches: int
    precision: str
    codecs: tuple[str, ...]  # [stages - 1]
    recompute: bool
    fixed: tuple[range, ...] | None  # boundaries given by the user
    virtual: int = 1  # stages on each device

    def memory(self) -> StageMemory:
        return StageMemory(
            self.layers,
            schedule=self.schedule,
            stages=len(self.devices),
            microbatches=self.microbatches,
            precision=self.precision,
            codecs=self.codecs,
            recompute=self.recompute,
            virtual=self.virtual,
        )

    def budgets(self) -> list[int]:
        return [device.budget_bytes for device in self.devices]


def make_plan(
    layer_costs: Sequence[LayerCost],
    devices: Sequence[Device],
    *,
    schedule: str = "1f1b",
    microbatches: int = 8,
    accumulate: int = 1,
    precision: str = "fp16",
    codec: str | Sequence[str] = "none",
    recompute: bool | str = "auto",
    max_stages: int | None = None,
    model: str = "",
    speeds: Sequence[float] | None = None,
    links: Sequence[float] | None = None,
    layers: Sequence[Sequence[int]] | None = None,
    max_microbatches: int | None = None,
    virtual: int | None = None,
) -> Plan:
    """Places layers on devices, in order, so that the slowest stage is as fast as the budgets allow.

    Args:
        layer_costs: one entry per layer, for one microbatch, in the precision of the training.
        devices: in pipeline order; how many stages each has is the schedule's and ``virtual``'s to say.
        schedule: a name that `spu.schedules.get` takes.
        microbatches: per run of the schedule.
        accumulate: runs of the schedule per step.
        precision: "fp16", "bf16" or "fp32".
        codec: "none", "fp16", "bf16" or "int8", for all boundaries or one for each.
        recompute: True, False, or "auto": only if nothing fits without.
        max_stages: use no more than this many of the devices (where each has one stage).
        model: a name for the plan.
        speeds: FLOP/s of each device. Layer times measured on the first device are scaled by the ratio; layers that
            were not measured take ``FLOPs / speed``, and twice that backward. By default all devices are alike.
        links: bytes per second over each boundary; by default transfers take no time.
        layers: (first, last + 1) per stage, if the boundaries are given and only to be checked and predicted.
        max_microbatches: the batch cannot be cut into more; limits what a refusal proposes.
        virtual: stages on each device; None for the schedule's own number. They share the device's budget equally.

    Returns:
        The plan, every stage of which is within its budget.

    Raises:
        BudgetError: no partition fits; says which budget is short by how many bytes, and what was tried and fits.
        ValueError: for more stages than layers, or arguments that make no sense.
    """
    _check_settings(schedule, microbatches, accumulate, precision, recompute)
    each = schedules.stages_per_rank(schedule, virtual)
    ranks = len(devices) if max_stages is None else min(len(devices), max_stages)
    stages = ranks * each
    check_stages(len(layer_costs), stages)
    needs, basis, slowness = _needs(layer_costs, len(devices), speeds)
    homes = schedules.stage_ranks(schedule, ranks, virtual) if ranks else []
    request = _Request(
        layers=needs,
        devices=tuple(_share(devices[home], each) for home in homes),
        slowness=tuple(slowness[home] for home in homes),
        schedule=schedule,
        microbatches=microbatches,
        precision=precision,
        codecs=_codecs(codec, stages),
        recompute=recompute is True,
        fixed=None if layers is None else _fixed(layers, len(layer_costs), stages),
        virtual=each,
    )
    parts = _place(request)
    if parts is None and recompute == "auto":
        request = dataclasses.replace(request, recompute=True)
        parts = _place(request)
    if parts is None:
        raise _refusal(request, max_microbatches)
    return _plan(request, parts, model, accumulate, basis, _links(links, stages))


def _share(device: Device, stages: int) -> Device:
    return device if stages == 1 else dataclasses.replace(device, budget_bytes=device.budget_bytes // stages)


def _place(request: _Request) -> list[range] | None:
    """The best partition within the budgets, or None."""
    memory, budgets = request.memory(), request.budgets()

    def fits(stage: int, first: int, last: int) -> bool:
        return memory.total(stage, first, last) <= budgets[stage]

    if request.fixed is not None:
        parts = list(request.fixed)
        return parts if all(fits(stage, part.start, part.stop) for stage, part in enumerate(parts)) else None
    again = [layer.forward_s if request.recompute else 0.0 for layer in request.layers]
    work = [0.0, *running_sum(n.forward_s + n.backward_s + a for n, a in zip(request.layers, again, strict=True))]

    def seconds(stage: int, first: int, last: int) -> float:
        return (work[last] - work[first]) * request.slowness[stage]

    return fastest(len(request.layers), len(request.devices), seconds, fits)


def _plan(
    request: _Request,
    parts: Sequence[range],
    model: str,
    accumulate: int,
    basis: str,
    links: Sequence[float] | None,
) -> Plan:
    memory = request.memory()
    stages = []
    for stage, part in enumerate(parts):
        here = request.layers[part.start : part.stop]
        forward_s = sum(layer.forward_s for layer in here) * request.slowness[stage]
        backward_s = sum(layer.backward_s for layer in here) * request.slowness[stage]
        stages.append(
            StagePlan(
                **dataclasses.asdict(memory.of(stage, part.start, part.stop)),
                device=request.devices[stage].name,
                layers=(part.start, part.stop),
                layer_names=tuple(layer.name for layer in here),
                budget_bytes=request.devices[stage].budget_bytes,
                forward_s=forward_s,
                backward_s=backward_s + (forward_s if request.recompute else 0.0),
            )
        )
    outputs = [request.layers[part.stop - 1].output_bytes for part in parts[:-1]]
    sizes = [wire_bytes(size, request.precision, codec) for size, codec in zip(outputs, request.codecs, strict=True)]
    transfer_s = tuple(0.0 for _ in sizes) if links is None else tuple(s / b for s, b in zip(sizes, links, strict=True))
    plan = Plan(
        model=model,
        schedule=request.schedule,
        microbatches=request.microbatches,
        accumulate=accumulate,
        precision=request.precision,
        transfer=request.codecs,
        recompute=request.recompute,
        stages=tuple(stages),
        predicted=Predicted(step_s=0.0, idle_share=0.0, transfer_s=transfer_s, basis=basis),
    )
    timeline = plan.timeline()
    predicted = dataclasses.replace(
        plan.predicted, step_s=accumulate * timeline.makespan, idle_share=timeline.idle_share
    )
    return dataclasses.replace(plan, predicted=predicted)


def _refusal(request: _Request, max_microbatches: int | None) -> BudgetError:
    """The error that says what is short, and what was tried and would fit."""
    memory = request.memory()
    names = [device.name for device in request.devices]
    if request.fixed is None:
        base = shortage(len(request.layers), len(request.devices), memory.total, request.budgets(), names)
    else:
        base = shortage_of(request.fixed, memory.total, request.budgets(), names)
    fixes = [_describe(label, changed, parts) for label, changed, parts in _working_fixes(request, max_microbatches)]
    how = f"{request.schedule}, {request.microbatches} microbatches, {request.precision}"
    how += ", recompute" if request.recompute else ", activations kept"
    if request.fixed is None:
        return base.error(names, fixes, f"no plan fits the budgets ({how}); the nearest one is short:")
    return base.error(names, fixes, f"the given layers do not fit the budgets ({how}):")


def _describe(label: str, request: _Request, parts: Sequence[range]) -> str:
    memory, budgets = request.memory(), request.budgets()
    totals = [memory.total(stage, part.start, part.stop) for stage, part in enumerate(parts)]
    fullest = max(range(len(parts)), key=lambda stage: totals[stage] / max(budgets[stage], 1))
    peak, budget = format_bytes(totals[fullest]), format_bytes(budgets[fullest])
    return f"{label}: the fullest device is then {request.devices[fullest].name}, {peak} of {budget}"


def _working_fixes(request: _Request, max_microbatches: int | None) -> Iterator[tuple[str, _Request, list[range]]]:
    """Changes that fit: each single one that does, or the first combination where no single one is enough."""
    found = False
    singles = [*_other_schedules(request), *_recomputed(request)]
    groups = [[change] for change in singles] + [list(_finer(request, "", max_microbatches))]
    groups.append(list(_more_devices(request)))
    for group in groups:
        for label, changed in group:
            parts = _place(changed)
            if parts is not None:
                found = True
                yield label, changed, parts
                break
    if found:
        return
    pairs = [
        (f"{label} and {more}", twice)
        for label, changed in _other_schedules(request)
        for more, twice in _recomputed(changed)
    ]
    for label, changed in [*singles, *pairs]:
        pairs += _finer(changed, f"{label} and ", max_microbatches)
    for label, changed in pairs:
        parts = _place(changed)
        if parts is not None:
            yield label, changed, parts
            return


def _other_schedules(request: _Request) -> Iterator[tuple[str, _Request]]:
    for name in schedules.names():
        if name != request.schedule and schedules.stages_per_rank(name) == request.virtual:
            yield f'schedule="{name}"', dataclasses.replace(request, schedule=name)


def _recomputed(request: _Request) -> Iterator[tuple[str, _Request]]:
    if not request.recompute:
        yield "recompute=True", dataclasses.replace(request, recompute=True)


def _finer(request: _Request, prefix: str, limit: int | None) -> Iterator[tuple[str, _Request]]:
    """The same batch cut into 2, 4, 8 and 16 times as many microbatches."""
    for factor in (2, 4, 8, 16):
        count = request.microbatches * factor
        if limit is not None and count > limit:
            return
        smaller = tuple(
            dataclasses.replace(
                layer,
                saved_bytes=-(-layer.saved_bytes // factor),
                shared_bytes=layer.shared_bytes // factor,
                output_bytes=-(-layer.output_bytes // factor),
            )
            for layer in request.layers
        )
        label = f"{prefix}microbatches={count} (of the same batch, so each 1/{factor} as large)"
        yield label, dataclasses.replace(request, layers=smaller, microbatches=count)


def _more_devices(request: _Request) -> Iterator[tuple[str, _Request]]:
    """Up to four more devices like the last; not of CPUs, whose budgets are shares of one memory."""
    last = request.devices[-1]
    if last.name.startswith("cpu") or request.fixed is not None or request.virtual > 1:
        return
    for more in range(1, 5):
        if len(request.devices) + more > len(request.layers):
            return
        codecs = (*request.codecs, *[request.codecs[-1] if request.codecs else "none"] * more)
        yield (
            f"{more} more device{'s' if more > 1 else ''} like {last.name}",
            dataclasses.replace(
                request,
                devices=(*request.devices, *[last] * more),
                slowness=(*request.slowness, *[request.slowness[-1]] * more),
                codecs=codecs,
            ),
        )


def _needs(
    costs: Sequence[LayerCost], devices: int, speeds: Sequence[float] | None
) -> tuple[tuple[LayerNeeds, ...], str, tuple[float, ...]]:
    """The layers with their times, what the times rest on, and what to multiply them by on each device."""
    if speeds is not None and (len(speeds) != devices or min(speeds) <= 0):
        raise ValueError(f"speeds must have one FLOP/s above 0 per device, {devices}, got {list(speeds)}")
    measured = all(cost.forward_s is not None and cost.backward_s is not None for cost in costs)
    base = speeds[0] if speeds else NOMINAL_FLOPS_PER_S
    needs = []
    for cost in costs:
        estimate = cost.forward_flops / base
        needs.append(
            LayerNeeds(
                name=cost.name,
                params=cost.param_count,
                saved_bytes=cost.saved_bytes,
                shared_bytes=getattr(cost, "shared_bytes", 0),
                output_bytes=cost.output_bytes,
                forward_s=float(cost.forward_s) if measured and cost.forward_s is not None else estimate,
                backward_s=float(cost.backward_s) if measured and cost.backward_s is not None else 2.0 * estimate,
            )
        )
    basis = "measured" if measured else "estimated" if speeds else "nominal"
    return tuple(needs), basis, tuple(base / speed for speed in speeds or [base] * devices)


def _check_settings(schedule: str, microbatches: int, accumulate: int, precision: str, recompute: bool | str) -> None:
    schedules.get(schedule)
    for name, value in (("microbatches", microbatches), ("accumulate", accumulate)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if precision not in ITEM_BYTES:
        raise ValueError(f"precision must be one of {', '.join(map(repr, ITEM_BYTES))}, got {precision!r}")
    if recompute not in (True, False, "auto"):
        raise ValueError(f"recompute must be True, False or 'auto', got {recompute!r}")


def _links(links: Sequence[float] | None, stages: int) -> Sequence[float] | None:
    if links is not None and (len(links) < stages - 1 or any(rate <= 0 for rate in links)):
        raise ValueError(f"links must have one rate above 0 per boundary, {stages - 1}, got {list(links)}")
    return None if links is None else links[: stages - 1]


def _codecs(codec: str | Sequence[str], stages: int) -> tuple[str, ...]:
    codecs = (codec,) * (stages - 1) if isinstance(codec, str) else tuple(codec)
    for name in (codec,) if isinstance(codec, str) else codecs:
        if name not in CODECS:
            raise ValueError(f"codec must be one of {', '.join(map(repr, CODECS))}, got {name!r}")
    if len(codecs) != stages - 1:
        raise ValueError(f"codec must be one name or one per boundary, {stages - 1}, got {len(codecs)}")
    return codecs


def _fixed(layers: Sequence[Sequence[int]], count: int, stages: int) -> tuple[range, ...]:
    parts = tuple(range(first, stop) for first, stop in layers)
    ends = [0, *(part.stop for part in parts)]
    if len(parts) != stages or not all(parts) or ends[:-1] != [p.start for p in parts] or ends[-1] != count:
        pairs = [(part.start, part.stop) for part in parts]
        raise ValueError(f"layers must be {stages} consecutive (first, last + 1) pairs from 0 to {count}, got {pairs}")
    return parts
