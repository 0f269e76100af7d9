"""A step of a streamed training on a clock: what each visit of a stage waits for, fetches and leaves.

All microbatches go through a stage before the next one's weights come (as in GreedySnake, arXiv
2512.17570), so a step is a list of visits: the forward of every stage, then the backward of every stage in reverse.

Several devices take the stages in turn, and a microbatch goes on to the next device as soon as one is done with it
(as in RoundPipe, arXiv 2604.27085). Each has its slots and its link; the disk and the host that updates are shared.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spu.schedules import Action, layer_outer

__all__ = ["RESOURCES", "SHARED", "Busy", "Visit", "simulate_visits"]

RESOURCES = ("compute", "link in", "link out", "host update", "disk")
"""What a step can wait for."""

_COMPUTE, _LINK_IN, _LINK_OUT, _HOST, _DISK = RESOURCES

SHARED = frozenset({_HOST, _DISK})
"""Those that several devices share."""


class Busy(NamedTuple):
    """A resource at work for a visit, in seconds from the start of the step."""

    resource: str
    visit: int
    start: float
    end: float
    microbatch: int = 0  # of compute, on several devices; a single one computes a visit as a whole


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
        compute_s: all microbatches, ``first_s`` included.
        first_s: what of it comes before the first one.
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
    first_s: float = 0.0
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
    rank: int
    microbatch: int = 0


def simulate_visits(
    visits: Sequence[Visit], slots: int, state_slots: int, ranks: int = 1, microbatches: int = 1
) -> list[Busy]:
    """Return what every resource does, and when, in a step.

    What comes is fetched ahead in the order of visits as soon as a slot is free: a weight slot, which a device's stages
    use in turn, when the visit that used it is done; a slot of gradients or state when what is in it has been written
    below.

    Args:
        visits: in order.
        slots: number of weight slots of a device.
        state_slots: number of a device's slots for gradients and state.
        ranks: number of devices, which take the stages in turn.
        microbatches: of a step; of one device alone they do not matter.
    """
    return _Step(visits, slots, state_slots, ranks, microbatches if ranks > 1 else 1).busy()


class _Step:
    """A step as tasks; arguments as of `simulate_visits`."""

    def __init__(self, visits: Sequence[Visit], slots: int, state_slots: int, ranks: int, microbatches: int) -> None:
        self.visits, self.slots, self.state_slots = visits, slots, state_slots
        self.ranks, self.microbatches = ranks, microbatches
        self.tasks: list[_Task] = []
        self.computes: dict[Action, int] = {}  # the task of each action

    def busy(self) -> list[Busy]:
        self._add_visits()
        self._chain()
        ends = _run(self.tasks)
        found = zip(self.tasks, ends, strict=True)
        return [Busy(task.resource, task.visit, end - task.seconds, end, task.microbatch) for task, end in found]

    def _add(self, visit: int, resource: str, seconds: float, after: Sequence[int]) -> list[int]:
        """Add a task, unless it takes no time; return what a task after it waits for."""
        if seconds == 0.0:
            return list(after)
        self.tasks.append(_Task(resource, visit, seconds, list(after), self.visits[visit].stage % self.ranks))
        return [len(self.tasks) - 1]

    def _compute(self, k: int, after: Sequence[int]) -> list[int]:
        """Add a visit's actions; return the last one."""
        visit, count = self.visits[k], self.microbatches
        rank, each = visit.stage % self.ranks, (visit.compute_s - visit.first_s) / count
        for index in range(count):
            self.computes[Action(visit.stage, "F" if visit.forward else "B", index)] = len(self.tasks)
            first = index == 0
            task = _Task(_COMPUTE, k, each + first * visit.first_s, list(after) if first else [], rank, index)
            self.tasks.append(task)
        return [len(self.tasks) - 1]

    def _add_visits(self) -> None:
        used: dict[tuple[int, int], list[int]] = {}  # rank and slot -> the tasks after which it is free
        # of forwards and backwards on each rank: tasks that free a state slot
        left: dict[tuple[int, bool], list[list[int]]] = defaultdict(list)
        brought: dict[int, list[int]] = defaultdict(list)  # the last of what a thread of the host has brought to a rank
        for k, visit in enumerate(self.visits):
            turn, rank = divmod(visit.stage, self.ranks)
            own, slot = left[rank, visit.forward], (rank, turn % self.slots)
            # A state slot is filled by what is read for the update, or by the backward.
            full = own[-self.state_slots] if len(own) >= self.state_slots else []
            free = used.get(slot, []) if visit.fetches else []
            # Below a GPU one thread does all that comes, a visit after the other: read, update, copy.
            ready = free + (brought[rank] if visit.in_s or visit.update_s else [])
            ready = self._add(k, _DISK, visit.read_s, ready + full if visit.updates else ready)
            ready = self._add(k, _HOST, visit.update_s, ready)
            written = self._add(k, _DISK, visit.written_s, ready) if visit.update_s else None
            ready = self._add(k, _LINK_IN, visit.in_s, ready)
            if visit.in_s or visit.update_s:
                brought[rank] = ready
            done = self._compute(k, ready + ([] if visit.forward else full))
            gone = self._add(k, _LINK_OUT, visit.out_s, done)
            written = self._add(k, _DISK, visit.written_s, gone) if written is None else written
            if visit.updates or (not visit.forward and visit.written_s + visit.out_s > 0.0):
                own.append(written)
            used[slot] = sorted({*done, *(written if visit.updates else [])})

    def _chain(self) -> None:
        """Let each action wait for the one before it on its rank, and for the message from its neighbour."""
        stages = max(visit.stage for visit in self.visits) + 1
        for row in layer_outer(self.ranks, self.microbatches, virtual=stages // self.ranks):
            own = [action for action in row if action in self.computes]
            for before, action in zip([None, *own], own):
                neighbour = action._replace(stage=action.stage - 1 if action.kind == "F" else action.stage + 1)
                waits = [self.computes[a] for a in (before, neighbour) if a in self.computes]
                self.tasks[self.computes[action]].after.extend(waits)


def _run(tasks: Sequence[_Task]) -> list[float]:
    """Return when each task ends: a resource takes the tasks that are ready first, one at a time."""
    waits = [len(set(task.after)) for task in tasks]
    then: list[list[int]] = [[] for _ in tasks]
    for k, task in enumerate(tasks):
        for before in set(task.after):
            then[before].append(k)
    ready, ends = [0.0] * len(tasks), [0.0] * len(tasks)
    queue = [(0.0, k) for k, count in enumerate(waits) if not count]
    free: dict[tuple[str, int], float] = defaultdict(float)
    while queue:
        when, k = heapq.heappop(queue)
        task = tasks[k]
        resource = task.resource, 0 if task.resource in SHARED else task.rank
        ends[k] = free[resource] = max(when, free[resource]) + task.seconds
        for after in then[k]:
            ready[after] = max(ready[after], ends[k])
            waits[after] -= 1
            if not waits[after]:
                heapq.heappush(queue, (ready[after], after))
    return ends
