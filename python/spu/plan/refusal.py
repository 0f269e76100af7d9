"""Why no plan fits: which budget is short, by how much, at which moment; and the smallest changes that would fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from spu import schedules
from spu.common.units import format_bytes, format_bytes_up
from spu.plan.in_flight import Held, words_of_peak
from spu.plan.layer_cost import LayerCost
from spu.plan.memory import state_bytes
from spu.plan.placement import Placement
from spu.plan.request import Request
from spu.schedules import Action
from spu.settings import Settings

__all__ = ["BudgetError", "refusal", "shrunk", "states"]

Change = tuple[str, Request]


class BudgetError(ValueError):
    """No partition fits the budgets.

    Attributes:
        stage: the stage that is shortest of memory in the partition that comes nearest to fitting.
        device: its device's name.
        needed_bytes: what that stage needs.
        budget_bytes: what it may use.
        short_bytes: the difference.
        fixes: what would fit, each tried.
    """

    def __init__(
        self, message: str, *, stage: int, needed_bytes: int, budget_bytes: int, device: str, fixes: Sequence[str]
    ) -> None:
        super().__init__(message)
        self.stage = stage
        self.device = device
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes
        self.short_bytes = needed_bytes - budget_bytes
        self.fixes = tuple(fixes)

    def after(self, other: BudgetError) -> BudgetError:
        """Return the error that says both, the other one first."""
        same = {"stage": self.stage, "needed_bytes": self.needed_bytes, "budget_bytes": self.budget_bytes}
        fixes = (*other.fixes, *self.fixes)
        return BudgetError(f"{other}\n{self}", **same, device=self.device, fixes=fixes)


def refusal(request: Request, max_microbatches: int | None = None, model: str | None = None) -> BudgetError:
    """Return the error that says what is short, and what was tried and would fit.

    Args:
        request: one that has no candidates.
        max_microbatches: the batch cannot be cut into more.
        model: its name, where no order of devices and no schedule fits: what training holds is then said first.
    """
    placed, budgets = request.closest(), request.budgets
    names = [device.name for device in request.devices]
    peaks = placed.bounds
    short = [rank for rank, peak in enumerate(peaks) if peak > budgets[rank]]
    assert short, "a request is refused although its nearest placement fits"
    fixes = [_describe(label, found) for label, found in _working_changes(request, max_microbatches)]
    fixes.append("budgets of " + ", ".join(f"{format_bytes_up(peaks[r])} for {names[r]}" for r in short))
    text = "\n  ".join([_headline(request), *(_line(placed, rank) for rank in short)])
    text += "\n  ".join(["\nwhat would fit:", *fixes])
    if model is not None:
        less = states(request.layers, request.settings) - sum(budgets)
        text = f"{model or 'the model'} does not fit.\n{_state_line(request)}.\n{text}"
        if less > 0:
            text += f"\nno placement can fit before the budgets together grow by {format_bytes(less)}"
    worst = max(short, key=lambda rank: peaks[rank] - budgets[rank])
    return BudgetError(
        text,
        stage=request.ranks.index(worst),
        device=names[worst],
        needed_bytes=peaks[worst],
        budget_bytes=budgets[worst],
        fixes=fixes,
    )


def states(layers: Sequence[LayerCost], settings: Settings) -> int:
    """Return the bytes that training holds whatever the batch: weights, gradients and optimizer states."""
    return sum(sum(state_bytes(layer, settings.precision, state=settings.state)) for layer in layers)


def _state_line(request: Request) -> str:
    """Return what training holds whatever the batch, in words, against all budgets together."""
    precision, state = request.settings.precision, request.settings.state
    parts = [sum(sizes) for sizes in zip(*(state_bytes(layer, precision, 0, state) for layer in request.layers))]
    masters = "fp32 masters" if state == "fp32" else "corrections"
    words = ("weights", "main gradients", masters, "AdamW's moments")
    list_ = ", ".join(f"{word} {format_bytes(size)}" for word, size in zip(words, parts) if size)
    return (
        f"training needs {format_bytes(sum(parts))} whatever the batch ({list_}); the budgets together are "
        f"{format_bytes(sum(request.budgets))}"
    )


def _headline(request: Request) -> str:
    s = request.settings
    how = f"{s.schedule}, {s.microbatches_in_words}, {s.precision}"
    how += ", activations kept" if s.recompute.mode in ("none", "given") else ", recompute"
    if request.fixed is None:
        return f"no plan fits the budgets ({how}); the nearest one is short:"
    return f"the given layers do not fit the budgets ({how}):"


def _line(placed: Placement, rank: int) -> str:
    """Return what a device is short of, and when."""
    device, peak, own = placed.request.devices[rank], placed.bounds[rank], placed.of_rank(rank)
    spans = [f"{p.start} to {p.stop - 1}" if len(p) > 1 else f"{p.start}" for p in (placed.parts[s] for s in own)]
    which = ("layer " if len(own) == 1 and len(placed.parts[own[0]]) == 1 else "layers ") + " and ".join(spans)
    place = f"stage {own[0]}" if len(own) == 1 else "stages " + ", ".join(map(str, own))
    missing = format_bytes_up(peak - device.budget_bytes)
    return (
        f"{device.name} ({place}) needs {format_bytes(peak)} for {which} and may use "
        f"{format_bytes(device.budget_bytes)}: short by {missing} {_moment(placed, rank)}"
    )


def _moment(placed: Placement, rank: int) -> str:
    """Return when the device holds most: always, if its state alone is too much, else the first action at the peak."""
    totals, each = placed.stages, placed.microbatch_bounds
    if sum(totals[s].state_bytes for s in placed.of_rank(rank)) > placed.request.budgets[rank]:
        return "all the time, for weights and optimizer alone"

    def size(action: Action, held: Held) -> int:
        beside = sum((full + left) * each[s] for s, full, left in held)
        return beside + each[action.stage] + totals[action.stage].workspace_bytes

    return words_of_peak(placed.request.actions[rank], size)


def _describe(label: str, placed: Placement) -> str:
    peaks, budgets = placed.bounds, placed.request.budgets
    fullest = max(range(len(peaks)), key=lambda rank: peaks[rank] / max(budgets[rank], 1))
    peak, budget = format_bytes(peaks[fullest]), format_bytes(budgets[fullest])
    return f"{label}: the fullest device is then {placed.request.devices[fullest].name}, {peak} of {budget}"


def _working_changes(request: Request, limit: int | None) -> Iterator[tuple[str, Placement]]:
    """Yield changes that fit: each single one that does, or the first combination where no single one is enough."""
    singles = [*_other_schedules(request), *_recomputed(request), *_packed(request)]
    groups: list[Iterable[Change]] = [[change] for change in singles]
    groups += [_finer(request, "", limit), _more_devices(request)]
    groups += [[change] for change in _larger(request)]
    found = [first for group in groups if (first := _first_that_fits(group))]
    if not found:
        pairs = [
            (f"{label} and {more}", twice)
            for label, changed in _other_schedules(request)
            for more, twice in _recomputed(changed)
        ]
        finer = [_finer(changed, f"{label} and ", limit) for label, changed in [*singles, *pairs]]
        found = [first] if (first := _first_that_fits(chain(pairs, *finer))) else []
    yield from found


def _first_that_fits(changes: Iterable[Change]) -> tuple[str, Placement] | None:
    fitting = ((label, placed[0]) for label, changed in changes if (placed := changed.candidates()))
    return next(fitting, None)


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
        yield 'transfer="int8"', replace(request, codecs=("int8",) * len(request.codecs))


def _finer(request: Request, prefix: str, limit: int | None) -> Iterator[Change]:
    """Yield the same batch cut into 2, 4, 8 and 16 times as many microbatches."""
    for factor in (2, 4, 8, 16):
        count = request.settings.run_microbatches * factor
        if limit is not None and count > limit:
            return
        label = f"{prefix}microbatches={count} (of the same batch, so each 1/{factor} as large)"
        layers = tuple(shrunk(layer, factor) for layer in request.layers)
        smaller = replace(request, layers=layers, loss=shrunk(request.loss, factor))
        yield label, smaller.changed(microbatches=count)


def shrunk(cost: LayerCost, factor: int) -> LayerCost:
    """Return the cost of a smaller microbatch. Workspace stays: it may be weight gradients, which do not shrink."""
    names = ("own_bytes", "input_bytes", "output_bytes", "deferred_bytes")
    return replace(cost, **{name: -(-getattr(cost, name) // factor) for name in names})


def _more_devices(request: Request) -> Iterator[Change]:
    """Yield more devices like the last GPU; not like CPUs, whose budgets are shares of one memory."""
    gpus = [rank for rank, device in enumerate(request.devices) if not device.name.startswith("cpu")]
    if not gpus or request.fixed is not None or request.settings.stages_per_rank > 1:
        return
    like, order = gpus[-1], request.order
    for more in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        if len(order) + more > len(request.layers):
            return
        codecs = (*request.codecs, *[request.codecs[-1] if request.codecs else "none"] * more)
        longer = (*order[: like + 1], *[order[like]] * more, *order[like + 1 :])
        label = f"{more} more device{'s' if more > 1 else ''} like {request.devices[like].name}"
        yield label, replace(request, order=longer, codecs=codecs)


def _larger(request: Request) -> Iterator[Change]:
    """Yield a larger budget for one device alone, the smallest that fits (to 1%), the smallest increase first."""
    if len(request.order) < 2 or request.fixed is not None:
        return
    options = []
    everything = states(request.layers, request.settings)
    for rank, budget in enumerate(request.budgets):
        low, high = budget, 2 * max(everything, budget)
        if not _with_budget(request, rank, high).candidates():
            continue
        while high - low > max(high // 100, 1):
            middle = (low + high) // 2
            low, high = (low, middle) if _with_budget(request, rank, middle).candidates() else (middle, high)
        options.append((high - budget, rank, high))
    for _, rank, budget in sorted(options):
        name = request.devices[rank].name
        yield f"a budget of {format_bytes_up(budget)} for {name} alone", _with_budget(request, rank, budget)


def _with_budget(request: Request, rank: int, budget: int) -> Request:
    devices = list(request.machine.devices)
    devices[request.order[rank]] = replace(request.devices[rank], budget_bytes=budget)
    return replace(request, machine=replace(request.machine, devices=tuple(devices)))
