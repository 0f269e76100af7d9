"""The search for the fastest plan over devices, schedule, microbatches, boundaries, recompute and codecs.

For every order of devices, schedule and number of microbatches the exact programme (`spu.plan.partition`) gives a few
partitions; each is simulated, the fastest are improved by moving boundaries one layer at a time, and the plan with the
shortest predicted step wins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from spu import schedules
from spu.plan.layer_cost import LayerCost
from spu.plan.machine import Machine
from spu.plan.make_streaming import StreamingRequest
from spu.plan.placement import Placement
from spu.plan.plan import Plan
from spu.plan.refusal import BudgetError, refusal, states
from spu.plan.request import Request, Times, crossings, fastest_codec
from spu.plan.streamed import Streamed
from spu.settings import AUTO, Settings

if TYPE_CHECKING:
    from spu.devices.tiers import Tiers

__all__ = ["CostsOf", "microbatch_counts", "search_plan"]

CostsOf = Callable[[int], tuple[Sequence[LayerCost], LayerCost]]
"""Rows of a microbatch -> costs of the layers, and of the loss."""

_SLACKS = (1.0, 1.15, 1.5, 2.5, math.inf)
"""How much slower than the best the slowest stage may be, if all stages together are then faster."""

_ORDERS, _IMPROVED, _ROUNDS = 3, 3, 12

_MOST_MICROBATCHES = 1 << 10
"""More are not tried: every action of a run is simulated."""


def microbatch_counts(settings: Settings, batch: int) -> list[int]:
    """Return the numbers of microbatches to try: divisors of the batch, so that microbatches are alike."""
    if isinstance(settings.microbatches, int):
        return [settings.microbatches]
    share, rest = divmod(batch, settings.accumulate)
    counts = [] if rest else [m for m in range(1, min(share, _MOST_MICROBATCHES) + 1) if share % m == 0]
    if len(counts) <= 8:
        return counts
    kept = counts[-1:]  # at most eight, the largest included, about a factor of two apart
    for m in reversed(counts):
        if 2 * m <= kept[0]:
            kept.insert(0, m)
    return kept[-8:]


def _schedule_names(settings: Settings) -> list[str]:
    """Return the schedules to try.

    In fp32 the linear layers of a searched plan are torch's own, which compute both gradients at once: a schedule that
    defers weight gradients has nothing to defer there.
    """
    if settings.schedule != AUTO:
        return [settings.schedule]
    return [n for n in schedules.names() if settings.precision != "fp32" or not schedules.splits_backward(n)]


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
    tiers: Tiers | None = None,
) -> Plan:
    """Return the fastest plan that is found and keeps every budget.

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
        tiers: what there is below the devices; None for nothing.

    Raises:
        BudgetError: nothing fits; says which budget is short by how much and when, and what would fit.
        ValueError: a batch that cannot be cut as the settings ask.
    """
    _check(settings, batch)
    search = _Search(costs_of, machine, settings, batch, model, same_order, one_process, times_of, tiers)
    if settings.residency not in (AUTO, "resident"):
        search.streaming(search.counts[-1]).check()
        found: list[Placement | Streamed | None] = [search.best_streamed()]
    else:
        found = [search.best(), search.best_streamed() if search.may_stream else None]
    best = min((way for way in found if way is not None), key=lambda way: way.step_s, default=None)
    if best is None:
        raise search.refusal()
    parts = best.settings.parts
    return best.plan(model=model, rows=batch // parts, tokens=tokens)


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


@dataclass
class _Search:
    """One search; fields as the arguments of `search_plan`."""

    costs_of: CostsOf
    machine: Machine
    settings: Settings
    batch: int
    model: str
    same_order: bool
    one_process: bool
    times_of: Callable[[int], Sequence[Times]] | None
    tiers: Tiers | None = None
    _profiles: dict[int, tuple[Sequence[LayerCost], LayerCost, Sequence[Times] | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = microbatch_counts(self.settings, self.batch)

    def best(self) -> Placement | None:
        """Return the fastest placement; None if nothing fits."""
        counts = self.counts
        layers, *_ = self._profile(self._rows(counts[-1]))
        self.settings.recompute.check_within(len(layers))
        if states(layers, self.settings) > sum(d.budget_bytes for d in self.machine.devices):
            return None  # whatever the batch: no need to look at any placement
        found = [placed for order in self._orders() for placed in self._found(order, counts)]
        if not found:  # before it is said that nothing fits, every order is tried with what takes least memory
            found = [placed for order in self._every_order() for placed in self._found(order, counts[-1:])]
        found.sort(key=lambda placed: float(f"{placed.step_s:.3e}"))  # of equally fast ones the simplest schedule
        fastest: dict[int, Placement] = {}
        for placed in found:
            fastest.setdefault(id(placed.request), placed)

        def seconds(placed: Placement) -> float:
            return placed.step_s if placed.fits else math.inf

        improved = [p.request.improved(p, seconds, _ROUNDS) for p in list(fastest.values())[:_IMPROVED]]
        return min(improved, key=seconds, default=None)

    @property
    def may_stream(self) -> bool:
        """Whether streaming is allowed and there is a tier to stream from."""
        return self.settings.residency == AUTO and self.tiers is not None and self.streaming(self.counts[-1]).possible

    def streaming(self, microbatches: int) -> StreamingRequest:
        """Return what is to be streamed with so many microbatches."""
        if self.tiers is None:
            raise ValueError(f"residency {self.settings.residency} needs tiers to stream from")
        layers, loss, times = self._profile(self._rows(microbatches))
        settings = replace(self.settings, schedule="layer_outer", virtual=None, microbatches=microbatches)
        return StreamingRequest(tuple(layers), loss, self.machine, settings, self.tiers, times)

    def best_streamed(self) -> Streamed | None:
        """Return the fastest way to stream; of equally fast ones the one with fewest microbatches."""
        found = [best for count in self.counts if (best := self.streaming(count).best()) is not None]
        return min(found, key=lambda case: float(f"{case.step_s:.2e}"), default=None)

    def _orders(self) -> list[tuple[int, ...]]:
        """Return orders of devices worth a full search: those that are fastest under one schedule."""
        every = self._every_order()
        if len(every) <= _ORDERS:
            return every
        middle = self.counts[len(self.counts) // 2]
        ranked = []
        for order in every:
            request = self._request(order, "1f1b", middle)
            times = [placed.step_s for placed in request.candidates(_SLACKS)] if request is not None else []
            ranked.append((min(times, default=math.inf), order))
        return [order for seconds, order in sorted(ranked)[:_ORDERS] if math.isfinite(seconds)]

    def _every_order(self) -> list[tuple[int, ...]]:
        """Return distinct orders: all of all subsets of up to four devices, else a few that are likely to be good."""
        speeds, ranks = self.machine.speeds, range(len(self.machine.devices))
        orders = [tuple(ranks)]
        if not self.same_order and len(ranks) <= 4:
            orders = [order for size in reversed(ranks) for order in itertools.permutations(ranks, size + 1)]
        elif not self.same_order:
            budget, rate = [d.budget_bytes for d in self.machine.devices], [speed.flops for speed in speeds]
            fastest_first = sorted(ranks, key=lambda k: -rate[k])
            # Leaving one out of many equal ones does not pay.
            for size in reversed(ranks) if max(rate) > 1.5 * min(rate) else ranks[-1:]:
                fast = fastest_first[: size + 1]
                large = sorted(fast, key=lambda k: -budget[k]), sorted(fast, key=lambda k: budget[k])
                orders += map(tuple, (fast, fast[::-1], *large))
        kinds: dict[tuple, tuple[int, ...]] = {}
        for order in orders:
            kinds.setdefault(tuple(self.machine.kind(k) for k in order), order)
        return list(kinds.values())

    def _found(self, order: Sequence[int], counts: list[int]) -> Iterator[Placement]:
        # Fewer microbatches than devices leave devices idle; they are for batches that cannot be cut further.
        for microbatches in [m for m in counts if m >= len(order)] or counts[-1:]:
            for name in _schedule_names(self.settings):
                if (request := self._request(order, name, microbatches)) is not None:
                    yield from request.candidates(_SLACKS)

    def _request(self, order: Sequence[int], schedule: str, microbatches: int) -> Request | None:
        virtual = self.settings.virtual if schedule == self.settings.schedule else None
        settings = replace(self.settings, schedule=schedule, virtual=virtual, microbatches=microbatches)
        layers, loss, times = self._profile(self._rows(microbatches))
        if settings.stages_per_rank * len(order) > len(layers):
            return None
        codecs = [self._codec(a, b, layers[len(layers) // 2].input_bytes) for a, b in crossings(settings, order)]
        try:
            request = Request(self.machine, tuple(order), tuple(layers), loss, times, settings, tuple(codecs))
            request.actions  # noqa: B018  some schedules need a certain number of microbatches
        except ValueError:
            if self.settings.schedule != AUTO:
                raise
            return None
        return request

    def _rows(self, microbatches: int) -> int:
        """Return the rows of one of so many microbatches."""
        return self.batch // (self.settings.accumulate * microbatches)

    def _codec(self, a: int, b: int, tensor_bytes: int) -> str:
        """Return the codec with which a tensor crosses the link fastest, packing and unpacking included."""
        if self.settings.transfer != AUTO or self.one_process:
            return self.settings.codec if a != b else "none"
        machine = self.machine
        if a == b or not machine.copies(a, b):
            return "none"

        return fastest_codec(machine, self.settings.precision, a, b, tensor_bytes)

    def _profile(self, rows: int) -> tuple[Sequence[LayerCost], LayerCost, Sequence[Times] | None]:
        """Return (layers, loss, [devices] measured times) for a number of rows."""
        if rows not in self._profiles:
            self._profiles[rows] = *self.costs_of(rows), None if self.times_of is None else self.times_of(rows)
        return self._profiles[rows]

    def refusal(self) -> BudgetError:
        """Return the error for a search that found nothing: what all devices and tiers lack, and what would fit."""
        streamed = None
        if self.may_stream or self.settings.residency not in (AUTO, "resident"):
            streamed = self.streaming(self.counts[-1]).refusal(self.batch)
            if not self.may_stream:
                return streamed
        order = tuple(range(len(self.machine.devices)))
        name = "1f1b" if self.settings.schedule == AUTO else self.settings.schedule
        request = self._request(order, name, self.counts[-1])
        if request is None:
            raise ValueError(
                f"{len(order)} devices are more than the model has layers for; name fewer, or another schedule"
            )
        resident = refusal(request, self.batch // self.settings.accumulate, self.model)
        return resident if streamed is None else streamed.after(resident)
