"""Why no plan fits: which budget is short, by how much, at which moment; and the smallest changes that would fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from spu import schedules
from spu.common.units import format_bytes, format_bytes_up
from spu.plan import core
from spu.plan.layer_cost import LayerCost
from spu.plan.memory import state_bytes
from spu.plan.partition import BudgetError
from spu.plan.request import Placement, Request
from spu.plan.show.colors import WORDS

__all__ = ["Change", "refusal", "state_line", "working_changes"]

Change = tuple[str, Request]


def refusal(request: Request, max_microbatches: int | None = None) -> BudgetError:
    """The error that says what is short, and what was tried and would fit.

    Args:
        request: one that has no candidates.
        max_microbatches: the batch cannot be cut into more.
    """
    placed = _nearest(request)
    peaks = request.peaks(placed)
    names = [device.name for device in request.devices]
    budgets = [device.budget_bytes for device in request.devices]
    short = [rank for rank, peak in enumerate(peaks) if peak > budgets[rank]]
    assert short, "a request is refused although its nearest placement fits"
    lines = [_line(request, placed, rank, peaks[rank]) for rank in short]
    fixes = [_describe(label, changed, found) for label, changed, found in working_changes(request, max_microbatches)]
    fixes.append("budgets of " + ", ".join(f"{format_bytes_up(peaks[r])} for {names[r]}" for r in short))
    worst = max(short, key=lambda rank: peaks[rank] - budgets[rank])
    return BudgetError(
        "\n  ".join([_headline(request), *lines]) + "\n  ".join(["\nwhat would fit:", *fixes]),
        stage=request.homes.index(worst),
        device=names[worst],
        needed_bytes=peaks[worst],
        budget_bytes=budgets[worst],
        fixes=fixes,
    )


def state_line(layers: Sequence[LayerCost], precision: str, budgets: Sequence[int]) -> str:
    """What training holds whatever the batch, in words, against all budgets together."""
    parts = [sum(state_bytes(layer, precision)[k] for layer in layers) for k in range(4)]
    words = ("weights", "main gradients", "fp32 masters", "AdamW's moments")
    list_ = ", ".join(f"{word} {format_bytes(size)}" for word, size in zip(words, parts) if size)
    return (
        f"training needs {format_bytes(sum(parts))} whatever the batch ({list_}); the budgets together are "
        f"{format_bytes(sum(budgets))}"
    )


def _headline(request: Request) -> str:
    s = request.settings
    how = f"{s.schedule}, {s.microbatches} microbatches, {s.precision}"
    how += ", activations kept" if s.recompute.mode in ("none", "given") else ", recompute"
    if request.fixed is None:
        return f"no plan fits the budgets ({how}); the nearest one is short:"
    return f"the given layers do not fit the budgets ({how}):"


def _line(request: Request, placed: Placement, rank: int, peak: int) -> str:
    device = request.devices[rank]
    own = [s for s, home in enumerate(request.homes) if home == rank]
    spans = [f"{p.start} to {p.stop - 1}" if len(p) > 1 else f"{p.start}" for p in (placed.parts[s] for s in own)]
    which = ("layer " if len(own) == 1 and len(placed.parts[own[0]]) == 1 else "layers ") + " and ".join(spans)
    place = f"stage {own[0]}" if len(own) == 1 else "stages " + ", ".join(map(str, own))
    missing = format_bytes_up(peak - device.budget_bytes)
    return (
        f"{device.name} ({place}) needs {format_bytes(peak)} for {which} and may use "
        f"{format_bytes(device.budget_bytes)}: short by {missing} {_moment(request, placed, rank)}"
    )


def _moment(request: Request, placed: Placement, rank: int) -> str:
    """When the device holds most: always, if its state alone is too much, else the first action at the peak."""
    totals = request.stage_bytes(placed)
    own = [s for s, home in enumerate(request.homes) if home == rank]
    if sum(totals[s].state_bytes for s in own) > request.devices[rank].budget_bytes:
        return "all the time, for weights and optimizer alone"
    each = [request.memory.bound(s, placed.parts[s].start, placed.parts[s].stop, placed.recomputed[s]) for s in own]
    sizes = dict(zip(own, each))
    last = {(a.stage, a.microbatch): a for a in request.actions[rank]}
    held, most, when = 0, -1, request.actions[rank][0]
    opened = set()
    for action in request.actions[rank]:
        key = action.stage, action.microbatch
        if key not in opened:
            opened.add(key)
            held += sizes[action.stage]
        if held + totals[action.stage].workspace_bytes > most:
            most, when = held + totals[action.stage].workspace_bytes, action
        if last[key] == action:
            held -= sizes[action.stage]
    what = WORDS[when.kind]
    return f"in the {what} of microbatch {when.microbatch} ({when})"


def _nearest(request: Request) -> Placement:
    """The partition where the device that is shortest of memory lacks least."""
    if request.fixed is not None:
        return request.placed([request.fixed[0].start, *(part.stop for part in request.fixed)])
    problem = request.problem()
    return request.placed(core.nearest(problem), problem)


def _describe(label: str, request: Request, placed: Placement) -> str:
    peaks, budgets = request.peaks(placed), [device.budget_bytes for device in request.devices]
    fullest = max(range(len(peaks)), key=lambda rank: peaks[rank] / max(budgets[rank], 1))
    peak, budget = format_bytes(peaks[fullest]), format_bytes(budgets[fullest])
    return f"{label}: the fullest device is then {request.devices[fullest].name}, {peak} of {budget}"


def working_changes(request: Request, limit: int | None) -> Iterator[tuple[str, Request, Placement]]:
    """Changes that fit: each single one that does, or the first combination where no single one is enough."""
    found = False
    singles = [*_other_schedules(request), *_recomputed(request), *_packed(request)]
    groups: list[list[Change]] = [[change] for change in singles]
    groups += [list(_finer(request, "", limit)), list(_more_devices(request))]
    groups += [[change] for change in _larger(request)]
    for group in groups:
        for label, changed in group:
            if placed := changed.candidates():
                found = True
                yield label, changed, placed[0]
                break
    if found:
        return
    pairs = [
        (f"{label} and {more}", twice)
        for label, changed in _other_schedules(request)
        for more, twice in _recomputed(changed)
    ]
    for label, changed in [*singles, *pairs]:
        pairs += _finer(changed, f"{label} and ", limit)
    for label, changed in pairs:
        if placed := changed.candidates():
            yield label, changed, placed[0]
            return


def _other_schedules(request: Request) -> Iterator[Change]:
    for name in schedules.names():
        if name != request.settings.schedule and schedules.stages_per_rank(name) == request.settings.stages_per_rank:
            yield f'schedule="{name}"', request.changed(schedule=name)


def _recomputed(request: Request) -> Iterator[Change]:
    if request.settings.recompute.mode in ("none", "given"):
        yield "recompute=True", request.changed(recompute=True)


def _packed(request: Request) -> Iterator[Change]:
    """Packed wires, where there are wires to pack."""
    if any(boundary.copied and boundary.codec == "none" for boundary in request.boundaries):
        yield 'transfer="int8"', dataclasses.replace(request, codecs=("int8",) * len(request.codecs))


def _finer(request: Request, prefix: str, limit: int | None) -> Iterator[Change]:
    """The same batch cut into 2, 4, 8 and 16 times as many microbatches."""
    for factor in (2, 4, 8, 16):
        count = request.settings.run_microbatches * factor
        if limit is not None and count > limit:
            return
        label = f"{prefix}microbatches={count} (of the same batch, so each 1/{factor} as large)"
        shrink = _shrink(factor)
        smaller = dataclasses.replace(request, layers=tuple(map(shrink, request.layers)), loss=shrink(request.loss))
        yield label, smaller.changed(microbatches=count)


def _shrink(factor: int) -> Callable[[LayerCost], LayerCost]:
    names = ("own_bytes", "input_bytes", "output_bytes", "deferred_bytes")

    def shrink(cost: LayerCost) -> LayerCost:
        smaller = {name: -(-getattr(cost, name) // factor) for name in names}
        # Workspace may be weight gradients, which do not shrink with the microbatch: left as it is.
        return dataclasses.replace(cost, **smaller)

    return shrink


def _more_devices(request: Request) -> Iterator[Change]:
    """More devices like one of those there are; not of CPUs, whose budgets are shares of one memory."""
    gpus = [rank for rank, device in enumerate(request.devices) if not device.name.startswith("cpu")]
    if not gpus or request.fixed is not None or request.settings.stages_per_rank > 1:
        return
    like = gpus[-1]
    for more in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        if len(request.devices) + more > len(request.layers):
            return
        yield (
            f"{more} more device{'s' if more > 1 else ''} like {request.devices[like].name}",
            dataclasses.replace(
                request,
                devices=_inserted(request.devices, like, more),
                times=_inserted(request.times, like, more),
                speeds=_inserted(request.speeds, like, more),
                codecs=(*request.codecs, *[request.codecs[-1] if request.codecs else "none"] * more),
                links=(*request.links, *[request.links[-1] if request.links else float("inf")] * more),
            ),
        )


def _inserted(values: tuple, rank: int, more: int) -> tuple:
    return (*values[: rank + 1], *[values[rank]] * more, *values[rank + 1 :])


def _larger(request: Request) -> Iterator[Change]:
    """A larger budget for one device alone, the smallest that fits (to 1%), for the device that needs least more."""
    if len(request.devices) < 2 or request.fixed is not None:
        return
    options = []
    everything = sum(sum(state_bytes(layer, request.settings.precision)) for layer in request.layers)
    for rank, device in enumerate(request.devices):
        low, high = device.budget_bytes, 2 * max(everything, device.budget_bytes)
        if not _with_budget(request, rank, high).candidates():
            continue
        while high - low > max(high // 100, 1):
            middle = (low + high) // 2
            low, high = (low, middle) if _with_budget(request, rank, middle).candidates() else (middle, high)
        options.append((high - device.budget_bytes, rank, high))
    for _, rank, budget in sorted(options):
        name = request.devices[rank].name
        yield f"a budget of {format_bytes_up(budget)} for {name} alone", _with_budget(request, rank, budget)


def _with_budget(request: Request, rank: int, budget: int) -> Request:
    devices = list(request.devices)
    devices[rank] = dataclasses.replace(devices[rank], budget_bytes=budget)
    return dataclasses.replace(request, devices=tuple(devices))
