"""A step of a streamed training on a clock: what each visit of a stage waits for, fetches and leaves.

All microbatches go through a stage before the next one's weights come (as in GreedySnake, arXiv
2512.17570), so a step is a list of visits: the forward of every stage, then the backward of every stage in reverse.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spu.plan.streaming import RESOURCES

__all__ = ["Visit", "simulate_visits"]

COMPUTE, LINK_IN, LINK_OUT, HOST, DISK = range(len(RESOURCES))


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


class _Task(NamedTuple):
    resource: int
    seconds: float
    after: list[int]


def simulate_visits(visits: Sequence[Visit], slots: int, state_slots: int) -> list[tuple[float, float]]:
    """Return when each visit's compute starts and ends, and last when the step does: (end, end).

    What comes is fetched ahead in the order of visits as soon as a slot is free: stage s's weight slot, s modulo their
    number, when the visit that used it is done; a slot of gradients or state when what is in it has been written below.
    """
    tasks: list[_Task] = []
    used: dict[int, list[int]] = {}  # slot -> the tasks after which it is free
    left: tuple[list[list[int]], list[list[int]]] = ([], [])  # of forward and backward: tasks that free a state slot
    computes: list[int] = []

    def add(resource: int, seconds: float, after: Sequence[int]) -> list[int]:
        """Add a task, unless it takes no time; return what a task after it waits for."""
        if seconds == 0.0 and resource != COMPUTE:
            return list(after)
        tasks.append(_Task(resource, seconds, list(after)))
        return [len(tasks) - 1]

    for visit in visits:
        free = used.get(visit.stage % slots, []) if visit.fetches else []
        own = left[0 if visit.forward else 1]
        holds = visit.updates or (not visit.forward and visit.written_s + visit.out_s > 0.0)
        ready = free + (own[-state_slots] if visit.updates and len(own) >= state_slots else [])
        ready = add(DISK, visit.read_s, ready)
        ready = add(HOST, visit.update_s, ready)
        written = add(DISK, visit.written_s, ready) if visit.forward and visit.update_s else None
        ready = add(LINK_IN, visit.in_s, ready)
        if holds and not visit.updates and len(own) >= state_slots:
            ready = ready + own[-state_slots]
        done = add(COMPUTE, visit.compute_s, ready + computes[-1:])
        computes += done
        gone = add(LINK_OUT, visit.out_s, done)
        if written is None:
            written = add(DISK, visit.written_s, gone)
        if holds:
            own.append(written)
        used[visit.stage % slots] = sorted({*done, *(written if visit.updates else [])})
    ends = _run(tasks)
    spans = [(ends[k] - tasks[k].seconds, ends[k]) for k in computes]
    end = max(ends, default=0.0)
    return [*spans, (end, end)]


def _run(tasks: Sequence[_Task]) -> list[float]:
    """Return when each task ends: a resource takes the tasks that are ready first, one at a time."""
    waits = [len(set(task.after)) for task in tasks]
    then: list[list[int]] = [[] for _ in tasks]
    for k, task in enumerate(tasks):
        for before in set(task.after):
            then[before].append(k)
    ready, ends = [0.0] * len(tasks), [0.0] * len(tasks)
    queue = [(0.0, k) for k, count in enumerate(waits) if not count]
    free = [0.0] * len(RESOURCES)
    while queue:
        when, k = heapq.heappop(queue)
        resource, seconds, _ = tasks[k]
        ends[k] = free[resource] = max(when, free[resource]) + seconds
        for after in then[k]:
            ready[after] = max(ready[after], ends[k])
            waits[after] -= 1
            if not waits[after]:
                heapq.heappush(queue, (ready[after], after))
    return ends
