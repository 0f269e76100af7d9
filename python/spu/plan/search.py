"""The search for the fastest plan: devices, schedule, microbatches, boundaries, recompute and codecs, by simulation.

For every order of devices, schedule and number of microbatches the exact programme (`spu.plan.core`) gives a handful of
partitions; each is simulated, the fastest are improved by moving boundaries one layer at a time, and the plan with the
shortest predicted step wins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from spu import schedules
from spu.common.units import format_bytes
from spu.plan.layer_cost import LayerCost
from spu.plan.machine import Machine
from spu.plan.make import with_bases, write_plan
from spu.plan.memory import state_bytes, wire_bytes
from spu.plan.partition import BudgetError
from spu.plan.plan import Plan
from spu.plan.refusal import refusal, state_line
from spu.plan.request import Placement, Request, Times, crossings
from spu.settings import AUTO, Settings

__all__ = ["SLACKS", "CostsOf", "microbatch_counts", "schedule_names", "search_plan"]

CostsOf = Callable[[int], tuple[Sequence[LayerCost], LayerCost]]
"""Rows of a microbatch -> costs of the layers, and of the loss."""

SLACKS = (1.0, 1.15, 1.5, 2.5, math.inf)
"""How much slower than the best a slowest stage may be where all together are faster: few microbatches want that."""

_ORDERS, _IMPROVED, _ROUNDS = 3, 3, 12


def microbatch_counts(settings: Settings, batch: int) -> list[int]:
    """Return the numbers of microbatches to try: divisors of the batch, so that microbatches are alike."""
    if isinstance(settings.microbatches, int):
        return [settings.microbatches]
    share, rest = divmod(batch, settings.accumulate)
    counts = [] if rest else [m for m in range(1, min(share, _MOST_MICROBATCHES) + 1) if share % m == 0]
    return [m for m in counts if m in _spread(counts)]


def schedule_names(settings: Settings) -> list[str]:
    """Return the schedules to try.

    In fp32 the linear layers of a searched plan are torch's own, which compute both gradients at once: a schedule that
    defers weight gradients has nothing to defer there.
    """
    if settings.schedule != AUTO:
        return [settings.schedule]
    return [n for n in schedules.names() if settings.precision != "fp32" or not schedules.splits_backward(n)]


_MOST_MICROBATCHES = 1 << 10
"""More are not tried: every action of a run is simulated."""


def _spread(counts: list[int]) -> set[int]:
    """At most eight of them, the largest included, about a factor of two apart."""
    kept: list[int] = []
    for m in reversed(counts):
        if not kept or 2 * m <= kept[-1] or len(counts) <= 8:
            kept.append(m)
    return set(kept[:8])


def search_plan(
    costs_of: CostsOf,
    machine: Machine,
    settings: Settings,
    *,
    batch: int,
    tokens: int = 0,
    model: str = "",
    same_order: bool = False,
    one_process: bool = False,
    times_of: Callable[[int], Sequence[Times]] | None = None,
) -> Plan:
    """The fastest plan found that keeps every budget.

    Args:
        costs_of: profiles the model for a number of rows; called once for each that is tried.
        machine: the devices, their speeds and links.
        settings: of the training; "auto" leaves a setting to the search.
        batch: rows of a step.
        tokens: of a row; noted in the plan.
        model: a name for the plan.
        same_order: keep the devices in the order given, and use all of them.
        one_process: all devices are in one process, between which "auto" packs nothing.
        times_of: rows of a microbatch -> measured seconds of every layer, and last of the loss, on each of the
            machine's devices; default: counted work at the machine's speeds.

    Raises:
        BudgetError: nothing fits; says which budget is short by how much and when, and what would fit.
        ValueError: a batch that cannot be cut as the settings ask.
    """
    _check(settings, batch)
    search = _Search(costs_of, machine, settings, batch, model, same_order, one_process, times_of)
    best = search.best()
    if best is None:
        raise search.refusal()
    request, placed = best
    rows = batch // request.settings.parts
    plan = write_plan(request, placed, model=model, basis=search.basis(request), rows=rows, tokens=tokens)
    return with_bases(plan, *costs_of(rows))


def _check(settings: Settings, batch: int) -> None:
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if not microbatch_counts(settings, batch):
        raise ValueError(
            f"a batch of {batch} rows cannot be cut into {settings.accumulate} equal runs: make it a multiple"
        )
    count = settings.accumulate * microbatch_counts(settings, batch)[-1]
    if batch < count or batch % count:
        raise ValueError(
            f"a batch of {batch} rows cannot be cut into {count} equal microbatches "
            "(microbatches x accumulate): make it a multiple"
        )


class _Search:
    def __init__(
        self,
        costs_of: CostsOf,
        machine: Machine,
        settings: Settings,
        batch: int,
        model: str,
        same_order: bool,
        one_process: bool,
        times_of: Callable[[int], Sequence[Times]] | None,
    ) -> None:
        self.costs_of, self.times_of, self.machine = costs_of, times_of, machine
        self.settings, self.batch, self.model = settings, batch, model
        self.same_order, self.one_process = same_order, one_process
        self.counts = microbatch_counts(settings, batch)
        self._profiles: dict[int, tuple[Sequence[LayerCost], LayerCost, Sequence[Times] | None]] = {}

    def best(self) -> tuple[Request, Placement] | None:
        """The fastest request and placement; None if nothing fits."""
        counts = self.counts
        layers, *_ = self._profile(self._rows(counts[-1]))
        self.settings.recompute.check_within(len(layers))
        if _states(layers, self.settings.precision) > sum(d.budget_bytes for d in self.machine.devices):
            return None  # whatever the batch: no need to look at any placement
        found = [entry for order in self._orders() for entry in self._found(order, counts)]
        if not found:  # before it is said that nothing fits, every order is tried with what takes least memory
            found = [entry for order in self._every_order() for entry in self._found(order, counts[-1:])]
        found.sort(key=lambda entry: float(f"{entry[0]:.3e}"))  # of equally fast ones the simplest schedule
        improved = [self._improved(*entry) for entry in _distinct(found)[:_IMPROVED]]
        best = min(improved, key=lambda entry: entry[0], default=None)
        return None if best is None else (best[1], best[2])

    def _found(self, order: Sequence[int], counts: list[int]) -> Iterator[tuple[float, Request, Placement]]:
        for request in self._requests(order, counts):
            for placed in request.candidates(SLACKS):
                yield request.step_s(placed), request, placed

    def _orders(self) -> list[tuple[int, ...]]:
        """Orders of devices worth a full search: those that are fastest under one schedule."""
        every = list(self._every_order())
        if len(every) <= _ORDERS:
            return every
        middle = self.counts[len(self.counts) // 2]
        ranked = []
        for order in every:
            request = self._request(order, "1f1b", middle)
            times = [request.step_s(placed) for placed in request.candidates(SLACKS)] if request is not None else []
            ranked.append((min(times, default=math.inf), order))
        return [order for seconds, order in sorted(ranked)[:_ORDERS] if math.isfinite(seconds)]

    def _every_order(self) -> Iterator[tuple[int, ...]]:
        """Distinct orders: all of all subsets of up to four devices, else a few that are likely to be good."""
        count = len(self.machine.devices)
        if self.same_order:
            yield tuple(range(count))
            return
        seen: set[tuple] = set()
        for order in self._likely_orders(count):
            kind = tuple(self.machine.kind(k) for k in order)
            if kind not in seen:
                seen.add(kind)
                yield order

    def _likely_orders(self, count: int) -> Iterator[tuple[int, ...]]:
        ranks = range(count)
        if count <= 4:
            for size in range(count, 0, -1):
                yield from itertools.permutations(ranks, size)
            return
        rate = [self.machine.flops[k] for k in ranks]
        budget = [device.budget_bytes for device in self.machine.devices]
        yield tuple(ranks)
        fastest_first = sorted(ranks, key=lambda k: -rate[k])
        smallest = 1 if max(rate) > 1.5 * min(rate) else count  # leaving one out of many equal ones does not pay
        for size in range(count, smallest - 1, -1):
            for order in (
                fastest_first[:size],
                fastest_first[:size][::-1],
                sorted(fastest_first[:size], key=lambda k: -budget[k]),
                sorted(fastest_first[:size], key=lambda k: budget[k]),
            ):
                yield tuple(order)

    def _requests(self, order: Sequence[int], counts: list[int]) -> Iterator[Request]:
        # Fewer microbatches than devices leave devices idle; they are for batches that cannot be cut further.
        for microbatches in [m for m in counts if m >= len(order)] or counts[-1:]:
            for name in schedule_names(self.settings):
                request = self._request(order, name, microbatches)
                if request is not None:
                    yield request

    def _request(self, order: Sequence[int], schedule: str, microbatches: int) -> Request | None:
        virtual = self.settings.virtual if schedule == self.settings.schedule else None
        settings = replace(self.settings, schedule=schedule, virtual=virtual, microbatches=microbatches)
        layers, loss, times = self._profile(self._rows(microbatches))
        if settings.stages_per_rank * len(order) > len(layers):
            return None
        codecs = [self._codec(a, b, layers[len(layers) // 2].input_bytes) for a, b in crossings(settings, order)]
        try:
            request = Request.on(self.machine, order, layers, loss, times, settings, codecs)
            request.actions  # noqa: B018  some schedules need a certain number of microbatches
        except ValueError:
            if self.settings.schedule != AUTO:
                raise
            return None
        return request

    def _rows(self, microbatches: int) -> int:
        """Rows of one of so many microbatches."""
        return self.batch // (self.settings.accumulate * microbatches)

    def _codec(self, a: int, b: int, tensor_bytes: int) -> str:
        """The codec with which a tensor is over the link soonest, packing and unpacking included."""
        if self.settings.transfer != AUTO or self.one_process:
            return self.settings.codec if a != b else "none"
        machine = self.machine
        if a == b or not machine.copies(a, b):
            return "none"

        def seconds(codec: str) -> float:
            packing = 0.0
            if codec != "none":
                packing = tensor_bytes / machine.speeds[a].pack_rate + tensor_bytes / machine.speeds[b].pack_rate
            return wire_bytes(tensor_bytes, self.settings.precision, codec) / machine.link(a, b) + packing

        return min(("none", "int8"), key=seconds)

    def _profile(self, rows: int) -> tuple[Sequence[LayerCost], LayerCost, Sequence[Times] | None]:
        """(layers, loss, [devices] measured times) for a number of rows."""
        if rows not in self._profiles:
            self._profiles[rows] = *self.costs_of(rows), None if self.times_of is None else self.times_of(rows)
        return self._profiles[rows]

    def basis(self, request: Request) -> str:
        """What the plan's times rest on."""
        if self.times_of is not None:
            return "measured"
        return self.machine.basis(device.name for device in request.devices)

    def _improved(self, seconds: float, request: Request, placed: Placement) -> tuple[float, Request, Placement]:
        """Boundaries moved by one layer as long as that shortens the step."""
        problem = request.problem()
        for _ in range(_ROUNDS):
            cuts = [0, *(part.stop for part in placed.parts)]
            moves = []
            for k, step in itertools.product(range(1, len(cuts) - 1), (-1, 1)):
                moved = [*cuts[:k], cuts[k] + step, *cuts[k + 1 :]]
                if cuts[k - 1] < moved[k] < cuts[k + 1]:
                    other = request.placed(moved, problem)
                    if request.fits(other):
                        moves.append((request.step_s(other), other))
            best = min(moves, key=lambda entry: entry[0], default=None)
            if best is None or best[0] >= seconds:
                break
            seconds, placed = best
        return seconds, request, placed

    def refusal(self) -> BudgetError:
        """The error for a search that found nothing: the request that lacks least, and what would make it fit."""
        order = tuple(range(len(self.machine.devices)))
        name = "1f1b" if self.settings.schedule == AUTO else self.settings.schedule
        request = self._request(order, name, self.counts[-1])
        if request is None:
            raise ValueError(
                f"{len(order)} devices are more than the model has layers for; name fewer, or another schedule"
            )
        limit = self.batch // self.settings.accumulate
        error = refusal(request, limit)
        budgets = [device.budget_bytes for device in request.devices]
        text = f"{self.model or 'the model'} does not fit.\n"
        text += state_line(request.layers, request.settings.precision, budgets) + ".\n" + str(error)
        less = _states(request.layers, request.settings.precision) - sum(budgets)
        if less > 0:
            text += f"\nno placement can fit before the budgets together grow by {format_bytes(less)}"
        return BudgetError(
            text,
            stage=error.stage,
            device=error.device,
            needed_bytes=error.needed_bytes,
            budget_bytes=error.budget_bytes,
            fixes=error.fixes,
        )


def _states(layers: Sequence[LayerCost], precision: str) -> int:
    return sum(sum(state_bytes(layer, precision)) for layer in layers)


def _distinct(found: list[tuple[float, Request, Placement]]) -> list[tuple[float, Request, Placement]]:
    """The fastest of each request."""
    seen: set[int] = set()
    result = []
    for entry in found:
        if id(entry[1]) not in seen:
            seen.add(id(entry[1]))
            result.append(entry)
    return result
