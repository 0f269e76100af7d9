"""When each action ran, or is predicted to run: one type for both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from spu.schedules.actions import Action, peak_in_flight


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
    """What every stage did, and when.

    Attributes:
        stages: number of stages, those without a span included.
        spans: ordered by stage, then by start; spans of one stage do not overlap.
    """

    stages: int
    spans: tuple[Span, ...]

    @classmethod
    def from_spans(cls, spans: Iterable[Span | tuple[int, str, int, float, float]], stages: int = 0) -> Timeline:
        """A timeline of spans in any order.

        Args:
            spans: ``Span``s or equal tuples; times on any one clock.
            stages: number of stages, if more than the spans name.

        Raises:
            ValueError: if a span has a negative stage, ends before it starts, is not finite, or overlaps another of
                its stage.
        """
        ordered = sorted((Span(*span) for span in spans), key=lambda s: (s.stage, s.start, s.end))
        for span in ordered:
            if span.stage < 0 or not (math.isfinite(span.start) and math.isfinite(span.end)) or span.end < span.start:
                raise ValueError(f"{span} is no span: the stage is at least 0 and the end not before the start")
        for before, after in itertools.pairwise(ordered):
            if before.stage == after.stage and after.start < before.end:
                raise ValueError(f"{before} and {after} overlap: a stage does one action at a time")
        return cls(max([stages, *(span.stage + 1 for span in ordered)]), tuple(ordered))

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
    def busy(self) -> list[float]:
        """Seconds of work of each stage."""
        seconds: list[list[float]] = [[] for _ in range(self.stages)]
        for span in self.spans:
            seconds[span.stage].append(span.seconds)
        return [math.fsum(parts) for parts in seconds]

    @property
    def idle_share(self) -> float:
        """Share of the stages' time in which nothing ran: ``1 - sum(busy) / (stages * makespan)``; the bubble."""
        if self.makespan <= 0.0:
            return 0.0
        return max(0.0, 1.0 - math.fsum(self.busy) / (self.stages * self.makespan))

    @property
    def peak_in_flight(self) -> list[int]:
        """Per stage, the most microbatches that were between the start of their forward and the end of backward."""
        return peak_in_flight([[Action(s.stage, s.kind, s.microbatch) for s in self.of(k)] for k in range(self.stages)])

    def of(self, stage: int) -> list[Span]:
        """The spans of one stage, by start."""
        return [span for span in self.spans if span.stage == stage]

    def mean_durations(self) -> dict[tuple[int, str], float]:
        """Mean seconds per (stage, kind): what `simulate` takes to ask how well these times could have been packed."""
        parts: dict[tuple[int, str], list[float]] = {}
        for span in self.spans:
            parts.setdefault((span.stage, span.kind), []).append(span.seconds)
        return {key: math.fsum(values) / len(values) for key, values in parts.items()}

    def shifted(self) -> Timeline:
        """The same timeline with its first action at 0."""
        origin = self.start
        moved = (span._replace(start=span.start - origin, end=span.end - origin) for span in self.spans)
        return Timeline(self.stages, tuple(moved))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for a JSON file."""
        return {"stages": self.stages, "spans": [list(span) for span in self.spans]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Timeline:
        """The inverse of `to_dict`."""
        return cls.from_spans((Span(*span) for span in data["spans"]), int(data["stages"]))
