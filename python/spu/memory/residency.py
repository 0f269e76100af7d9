"""Residency of a stage's tensors: fetch them before the stage's work, release them after it.

An engine knows in what order a rank visits its stages: a *visit* is a run of consecutive actions on one stage, such as
the forwards of all microbatches. It tells the residency of its ranks the order, and then calls ``fetch``
before a visit and ``release`` after it:

    begin, (fetch, work, release) for each visit in turn, end

all of it in the thread of the rank. A stage whose tensors stay on its device needs none of this, and `Resident` does
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

from spu.schedules import Action

__all__ = ["RESIDENT", "Residency", "Resident", "Visit", "visits_of"]


class Visit(NamedTuple):
    """Consecutive actions on one stage.

    Attributes:
        stage: its index.
        backward: whether gradients are made.
    """

    stage: int
    backward: bool


def visits_of(actions: Iterable[Action]) -> list[tuple[Visit, list[Action]]]:
    """Return a rank's actions as visits, each with its actions."""
    runs = [(stage, list(own)) for stage, own in groupby(actions, key=lambda action: action.stage)]
    return [(Visit(stage, any(action.kind != "F" for action in own)), own) for stage, own in runs]


class Residency(Protocol):
    """Brings a stage's tensors to the device that works with them, and takes them away afterwards.

    An implementation that moves a parameter swaps its ``data`` as a whole: copying in place into memory that autograd
    has saved for a backward would change its version counter, and the backward would raise.
    """

    def begin(self, visits: Sequence[Visit]) -> None:
        """Take the order of the visits to come."""

    def fetch(self, visit: Visit) -> None:
        """Return when work that is enqueued from now on sees the stage's weights on its device."""

    def release(self, visit: Visit) -> None:
        """Allow the weights to leave the device as soon as the work enqueued so far is done."""

    def end(self) -> None:
        """End the run, also one that failed: nothing is fetched any more."""


class Resident:
    """The residency of stages that always stay on their devices: nothing to do."""

    def begin(self, visits: Sequence[Visit]) -> None:
        """Do nothing: no order matters."""

    def fetch(self, visit: Visit) -> None:
        """Do nothing: the weights are there."""

    def release(self, visit: Visit) -> None:
        """Do nothing: the weights stay."""

    def end(self) -> None:
        """Do nothing."""


RESIDENT = Resident()
