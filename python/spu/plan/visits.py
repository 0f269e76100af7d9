"""A step of a streamed training on a clock: what each visit of a stage waits for, fetches and leaves.

All microbatches go through a stage before the next one's weights come (as in GreedySnake, arXiv
2512.17570), so a step is a list of visits: the forward of every stage, then the backward of every stage in reverse.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["RESOURCES", "Busy", "Visit", "simulate_visits"]

RESOURCES = ("compute", "link in", "link out", "host update", "disk")
"""What a step can wait for."""

_COMPUTE, _LINK_IN, _LINK_OUT, _HOST, _DISK = RESOURCES


class Busy(NamedTuple):
    """A resource at work for a visit, in seconds from the start of the step."""

    resource: str
    visit: int
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One visit: seconds of its parts, in the order in which they follow each other.

    Attributes:
        stage: whose.
        forward: whether it is the stage's forward; else its backward.
        fetches: whether weights come into a slot; else they are still in theirs, or on the device always.
        updates: whether the last step's update is done before the weights are used.
        read_s: the disk reads what comes.
        update_s: the update, on the host beside a GPU; on a CPU it is part of ``compute_s``.
        in_s: the link brings what comes.
        compute_s: all microbatches.
        out_s: the link takes gradients, or activations that wait below.
        written_s: the disk writes what the update changed, and what leaves.
    """

    stage: int
    forward: bool
    fetches: bool
    updates: bool
    read_s: float = 0.0
    update_s: float = 0.0
    in_s: float = 0.0
    compute_s: float = 0.0
    out_s: float = 0.0
    written_s: float = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds for which each of `RESOURCES` is busy."""
        values = (self.compute_s, self.in_s, self.out_s, self.update_s, self.read_s + self.written_s)
        return dict(zip(RESOURCES, values, strict=True))


class _Task(NamedTuple):
    resource: str
    visit: int
    seconds: float
    after: list[int]


def simulate_visits(visits: Sequence[Visit], slots: int, state_slots: int) -> list[Busy]:
    """Return what every resource does, and when, in a step.

    What comes is fetched ahead in the order of visits as soon as a slot is free: stage s's weight slot, s modulo their
    number, when the visit that used it is done; a slot of gradients or state when what is in it has been written below.

    Args:
        visits: in order.
        slots: number of weight slots.
        state_slots: number of slots for gradients and state.
    """
    tasks: list[_Task] = []
    used: dict[int, list[int]] = {}  # slot -> the tasks after which it is free
    left: tuple[list[list[int]], list[list[int]]] = ([], [])  # of forwards and backwards: tasks that free a state slot
    computed: list[int] = []  # the last visit's
    brought: list[int] = []  # the last of what a thread of the host has brought

    def add(visit: int, resource: str, seconds: float, after: Sequence[int]) -> list[int]:
        """Add a task, unless it takes no time; return what a task after it waits for."""
        if seconds == 0.0 and resource != _COMPUTE:
            return list(after)
        tasks.append(_Task(resource, visit, seconds, list(after)))
        return [len(tasks) - 1]

    for k, visit in enumerate(visits):
        own = left[0 if visit.forward else 1]
        # A state slot is filled by what is read for the update, or by the backward.
        full = own[-state_slots] if len(own) >= state_slots else []
        free = used.get(visit.stage % slots, []) if visit.fetches else []
        # Below a GPU one thread does all that comes, a visit after the other: read, update, copy.
        ready = free + (brought if visit.in_s or visit.update_s else [])
        ready = add(k, _DISK, visit.read_s, ready + full if visit.updates else ready)
        ready = add(k, _HOST, visit.update_s, ready)
        written = add(k, _DISK, visit.written_s, ready) if visit.update_s else None
        ready = add(k, _LINK_IN, visit.in_s, ready)
        brought = ready if visit.in_s or visit.update_s else brought
        done = add(k, _COMPUTE, visit.compute_s, ready + computed + ([] if visit.forward else full))
        computed = done
        gone = add(k, _LINK_OUT, visit.out_s, done)
        written = add(k, _DISK, visit.written_s, gone) if written is None else written
        if visit.updates or (not visit.forward and visit.written_s + visit.out_s > 0.0):
            own.append(written)
        used[visit.stage % slots] = sorted({*done, *(written if visit.updates else [])})
    ends = _run(tasks)
    return [Busy(task.resource, task.visit, end - task.seconds, end) for task, end in zip(tasks, ends, strict=True)]


def _run(tasks: Sequence[_Task]) -> list[float]:
    """Return when each task ends: a resource takes the tasks that are ready first, one at a time."""
    waits = [len(set(task.after)) for task in tasks]
    then: list[list[int]] = [[] for _ in tasks]
    for k, task in enumerate(tasks):
        for before in set(task.after):
            then[before].append(k)
    ready, ends = [0.0] * len(tasks), [0.0] * len(tasks)
    queue = [(0.0, k) for k, count in enumerate(waits) if not count]
    free = dict.fromkeys(RESOURCES, 0.0)
    while queue:
        when, k = heapq.heappop(queue)
        resource, _, seconds, _ = tasks[k]
        ends[k] = free[resource] = max(when, free[resource]) + seconds
        for after in then[k]:
            ready[after] = max(ready[after], ends[k])
            waits[after] -= 1
            if not waits[after]:
                heapq.heappush(queue, (ready[after], after))
    return ends
