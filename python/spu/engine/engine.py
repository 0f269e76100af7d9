"""The protocol of an engine: it runs a schedule over stages, and tasks for each of them, until it is closed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from spu.common.tracker import Tally
from spu.devices.clock import Mark, Reading
from spu.engine.graphs import StageGraphs
from spu.engine.stage import Stage
from spu.memory.residency import Residency
from spu.ops.sink import BackwardScope
from spu.schedules import Action, Span, Timeline

__all__ = ["Engine", "MarkedSpan", "Recording", "Round", "StageError"]


class StageError(RuntimeError):
    """A stage failed; ``__cause__`` is what it raised.

    Attributes:
        stage: index of the stage.
        action: the action that failed, e.g. ``1B3`` for stage 1, backward, microbatch 3; None outside the schedule.
    """

    def __init__(self, stage: int, device: str, action: Action | None, cause: BaseException) -> None:
        self.stage = stage
        self.action = action
        doing = "" if action is None else f", action {action}, microbatch {action.microbatch}"
        super().__init__(f"stage {stage} ({device}){doing}: {type(cause).__name__}: {cause}")


@dataclass
class Round:
    """One run of a schedule over microbatches, and its results.

    Attributes:
        actions: one list for each rank.
        inputs, targets, weights: one of each for each microbatch; no targets means no loss.
        first_microbatch: the number of the first one in the whole step, for its random draws.
        run_seed, step: likewise.
        scopes: the loss scale on each stage; None for a pass without backward.
        keep_outputs: collect the last stage's outputs.
        autocast: entered around every forward.
        largest: the inputs of the batch's largest microbatch, which another process may run; None: it is one of these.
        losses, outputs: results by microbatch.
    """

    actions: Sequence[Sequence[Action]]
    inputs: Sequence[Any]
    targets: Sequence[Any] | None
    weights: Sequence[torch.Tensor] | None
    run_seed: int
    step: int
    first_microbatch: int = 0
    scopes: Sequence[BackwardScope] | None = None
    keep_outputs: bool = False
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    largest: Any = None
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)

    @property
    def train(self) -> bool:
        """Whether the round has backwards."""
        return self.scopes is not None


class MarkedSpan(NamedTuple):
    """One action between two marks of its stage's device."""

    action: Action
    begin: Mark
    end: Mark


class Recording:
    """What ran when in one run of a schedule. On a card it may still run: the first to ask for times waits for it.

    Args:
        stages: of the run.
        ranks: the rank of each stage.
        start: when the run began on the host, seconds of ``time.perf_counter``.
        spans: the actions, those of a stage in order.
    """

    def __init__(self, stages: Sequence[Stage], ranks: Sequence[int], start: float, spans: list[MarkedSpan]) -> None:
        self._devices = [stage.device.torch_device for stage in stages]
        self._ranks, self._start, self._spans = list(ranks), start, spans
        self._timeline: Timeline | None = None

    def timeline(self) -> Timeline:
        """Return the measured timeline, in seconds from the start of the run."""
        if self._timeline is None:
            reading = Reading()
            self._timeline = Timeline.from_spans([self._read(reading, span) for span in self._spans], ranks=self._ranks)
            self._spans = []
        return self._timeline

    def _read(self, reading: Reading, span: MarkedSpan) -> Span:
        action, device = span.action, self._devices[span.action.stage]
        begin, end = (reading.seconds(moment, device) - self._start for moment in (span.begin, span.end))
        return Span(action.stage, action.kind, action.microbatch, begin, end)


class Engine(Protocol):
    """An object that runs schedules over stages; `spu.engine.local.LocalEngine` does so with threads of this process.

    Attributes:
        stages: in pipeline order.
        ranks: the rank of each stage.
        residencies: of each rank: brings the tensors of its stages to the device for their work.
        backend: a forced kernel backend, or None for automatic choice; may be changed between runs.
        graphs: captures the last stage's microbatches; None: all run eagerly. An engine may leave it alone.
        tallies: one for each rank, which counts the bytes that its actions allocate; None: bytes are not counted.
        here: the ranks that this process is.
    """

    stages: list[Stage]
    ranks: list[int]
    residencies: list[Residency]
    backend: str | None
    tallies: list[Tally] | None
    here: frozenset[int]
    graphs: StageGraphs | None

    def run(self, work: Round) -> Recording:
        """Run a schedule to its end, leave losses and outputs in ``work``, and return what ran when.

        Raises:
            StageError: a stage failed; every other one has stopped, and the round leaves nothing behind.
            KeyboardInterrupt: likewise.
        """

    def each(self, task: Callable[[Stage], Any]) -> list[Any]:
        """Run ``task`` for every stage, where its device's work is done, and return the results in stage order.

        Raises:
            StageError: a task failed; the others have ended.
        """

    def close(self) -> None:
        """Give back threads and links; harmless when called twice."""
