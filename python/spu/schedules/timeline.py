"""The measured or predicted times of actions: one type for both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from spu.schedules.actions import Action, peak_in_flight

__all__ = ["Span", "Timeline"]


class Span(NamedTuple):
    """One action in time. ``start`` and ``end`` are seconds on any common clock."""

    stage: int
    kind: str
    microbatch: int
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """The actions of every stage with their times.

    Attributes:
        stages: number of stages, those without a span included.
        spans: ordered by stage, then by start; spans of one rank do not overlap.
        ranks: the rank of each stage; by default stage ``s`` on rank ``s``.
    """

    stages: int
    spans: tuple[Span, ...]
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.ranks:
            object.__setattr__(self, "ranks", tuple(range(self.stages)))

    @classmethod
    def from_spans(
        cls,
        spans: Iterable[Span | tuple[int, str, int, float, float]],
        stages: int = 0,
        *,
        ranks: Sequence[int] | None = None,
    ) -> Timeline:
        """Make a timeline of spans in any order.

        Args:
            spans: ``Span``s or equal tuples; times on any one clock.
            stages: number of stages, if more than the spans name.
            ranks: the rank of each stage; by default each has one of its own.

        Raises:
            ValueError: if a span has a negative stage or one without a rank, ends before it starts, is not finite, or
                overlaps another of its rank.
        """
        ordered = sorted((Span(*span) for span in spans), key=lambda s: (s.stage, s.start, s.end))
        for span in ordered:
            if span.stage < 0 or not (math.isfinite(span.start) and math.isfinite(span.end)) or span.end < span.start:
                raise ValueError(f"{span} is no span: the stage is at least 0 and the end not before the start")
        count = max([stages, *(span.stage + 1 for span in ordered)])
        rank_of = tuple(range(count)) if ranks is None else tuple(ranks)
        if len(rank_of) < count:
            raise ValueError(f"there are {count} stages, but ranks has {len(rank_of)} entries; give one for each stage")
        timeline = cls(len(rank_of), tuple(ordered), rank_of)
        for rank in range(timeline.rank_count):
            for before, after in itertools.pairwise(timeline.of_rank(rank)):
                if after.start < before.end:
                    raise ValueError(f"{before} and {after} overlap: a rank does one action at a time")
        return timeline

    @property
    def start(self) -> float:
        """When the first action starts, seconds; 0 for an empty timeline."""
        return min((span.start for span in self.spans), default=0.0)

    @property
    def end(self) -> float:
        """When the last action ends, seconds."""
        return max((span.end for span in self.spans), default=0.0)

    @property
    def makespan(self) -> float:
        """Seconds from the start of the first action to the end of the last."""
        return self.end - self.start

    @property
    def rank_count(self) -> int:
        """Number of ranks: the rows of a picture."""
        return max(self.ranks, default=-1) + 1

    @property
    def busy(self) -> list[float]:
        """Seconds of work of each rank."""
        return [math.fsum(span.seconds for span in self.of_rank(rank)) for rank in range(self.rank_count)]

    @property
    def idle_share(self) -> float:
        """Share of the ranks' time in which nothing ran: ``1 - sum(busy) / (ranks * makespan)``; the bubble."""
        if self.makespan <= 0.0:
            return 0.0
        return max(0.0, 1.0 - math.fsum(self.busy) / (self.rank_count * self.makespan))

    @property
    def peak_in_flight(self) -> list[int]:
        """Per stage, the most microbatches that were between the start of their forward and the end of backward."""
        peaks = peak_in_flight([[Action(*span[:3]) for span in self.of_rank(r)] for r in range(self.rank_count)])
        return [*peaks, *[0] * (self.stages - len(peaks))][: self.stages]

    def of(self, stage: int) -> list[Span]:
        """Return the spans of one stage, by start."""
        return [span for span in self.spans if span.stage == stage]

    def of_rank(self, rank: int) -> list[Span]:
        """Return the spans of all stages of one rank, by start."""
        return sorted((s for s in self.spans if self.ranks[s.stage] == rank), key=lambda s: (s.start, s.end))

    def mean_durations(self) -> dict[tuple[int, str], float]:
        """Return mean seconds per (stage, kind), as `simulate` takes them."""
        parts: dict[tuple[int, str], list[float]] = {}
        for span in self.spans:
            parts.setdefault((span.stage, span.kind), []).append(span.seconds)
        return {key: math.fsum(values) / len(values) for key, values in parts.items()}

    def shifted(self) -> Timeline:
        """Return the same timeline with its first action at 0."""
        origin = self.start
        moved = (span._replace(start=span.start - origin, end=span.end - origin) for span in self.spans)
        return Timeline(self.stages, tuple(moved), self.ranks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, for a JSON file."""
        return {"stages": self.stages, "ranks": list(self.ranks), "spans": [list(span) for span in self.spans]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Timeline:
        """Invert `to_dict`; also read files without ranks, in which every stage has its own."""
        return cls.from_spans((Span(*span) for span in data["spans"]), int(data["stages"]), ranks=data.get("ranks"))
