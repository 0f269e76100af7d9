"""The times of a schedule's actions, computed from their durations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from spu.schedules.actions import KINDS, Action, Actions, ranks_of
from spu.schedules.timeline import Span, Timeline
from spu.schedules.validate import find_deadlock, marked_error

__all__ = ["Durations", "FlatSchedule", "flatten", "run_flat", "runner", "simulate"]

Durations = Mapping[Any, float] | Sequence[tuple[float, ...]]
"""Seconds by ``(stage, kind)`` or by ``Action``, or per stage a pair (F, B) or a triple (F, I, W)."""


class FlatSchedule(NamedTuple):
    """A schedule as arrays, the one form that both simulators read. Entry k is the k-th action, rank by rank."""

    first: list[int]  # [ranks + 1] index of each rank's first action, then the number of actions
    stages: list[int]  # [actions]
    kinds: list[int]  # [actions] index into KINDS
    microbatches: list[int]  # [actions]
    seconds: list[float]  # [actions]
    transfers: list[float]  # [stages - 1] seconds over each boundary, either direction


def simulate(
    actions: Actions, durations: Durations, transfers: float | Sequence[float] = 0.0, *, backend: str = "auto"
) -> Timeline:
    """Run a schedule on a clock: every action starts as soon as its rank is free and its inputs have arrived.

    An input arrives ``transfers[b]`` seconds after the action that made it ended, or after the transfer before it:
    transfers over boundary ``b`` (between stages b and b + 1) keep neither rank busy, and those of one direction take
    turns.

    Args:
        actions: one list of actions per rank, as `validate` accepts it.
        durations: seconds per ``(stage, kind)``, or per ``Action`` where single actions differ (looked up first); or
            for each stage a pair (F, B), of which I and W take half of B each, or a triple (F, I, W), of which B takes
            I + W.
        transfers: seconds per boundary: one each, or one number for all that lie between two ranks (a boundary inside
            a rank then takes no time).
        backend: "python", "cpp" (`spu._host`), or "auto": cpp if it was built. Both give the same bits.

    Returns:
        The timeline; its clock starts at 0.

    Raises:
        ScheduleError: if the schedule deadlocks.
        ValueError: for a missing, negative or non-finite duration or transfer, or an unknown backend.
        RuntimeError: for backend "cpp" where `spu._host` is not built.
    """
    flat = flatten(actions, durations, transfers)
    starts, ends = runner(backend)(*flat)
    if any(math.isnan(end) for end in ends):
        fault = find_deadlock(actions)
        assert fault is not None, "the simulator stopped in a schedule without deadlock"
        raise marked_error(actions, *fault)
    order = [action for row in actions for action in row]
    return Timeline.from_spans(map(_span, order, starts, ends), ranks=ranks_of(actions))


def _span(action: Action, start: float, end: float) -> Span:
    return Span(action.stage, action.kind, action.microbatch, start, end)


def runner(backend: str) -> Callable[..., tuple[list[float], list[float]]]:
    """Return `run_flat`, or the function of the C++ library that gives the same.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: for backend "cpp" where `spu._host` is not built.
    """
    if backend not in ("auto", "python", "cpp"):
        raise ValueError(f"backend must be 'auto', 'python' or 'cpp', got {backend!r}")
    if backend == "python":
        return run_flat
    try:
        from spu import _host
    except ImportError as error:
        if backend == "cpp":
            raise RuntimeError("spu._host is not built: install with a C++ compiler, or use 'python'") from error
        return run_flat
    run: Callable[..., tuple[list[float], list[float]]] = _host.simulate
    return run


def flatten(actions: Actions, durations: Durations, transfers: float | Sequence[float]) -> FlatSchedule:
    """Return the schedule, its durations and transfers as checked arrays."""
    first, stages, kinds, microbatches, seconds = [0], [], [], [], []
    for row_index, row in enumerate(actions):
        for position, action in enumerate(row):
            if action.stage < 0 or action.kind not in KINDS or action.microbatch < 0:
                raise marked_error(actions, row_index, position, f"{action} is no action")
            stages.append(action.stage)
            kinds.append(KINDS.index(action.kind))
            microbatches.append(action.microbatch)
            seconds.append(_seconds(durations, action))
        first.append(len(kinds))
    links = _links(ranks_of(actions), transfers)
    return FlatSchedule(first, stages, kinds, microbatches, seconds, links)


def _links(ranks: Sequence[int], transfers: float | Sequence[float]) -> list[float]:
    if isinstance(transfers, Sequence):
        links = [float(value) for value in transfers]
    else:
        links = [float(transfers) if before != after else 0.0 for before, after in itertools.pairwise(ranks)]
    boundaries = max(len(ranks) - 1, 0)
    if len(links) != boundaries:
        raise ValueError(f"{len(ranks)} stages have {boundaries} boundaries, but transfers has {len(links)} values")
    for index, value in enumerate(links):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"transfers[{index}] must be a finite number of seconds, 0 or more, got {value}")
    return links


def _seconds(durations: Durations, action: Action) -> float:
    try:
        if isinstance(durations, Mapping):
            value = durations[action] if action in durations else durations[action.stage, action.kind]
        else:
            value = _of_stage(durations[action.stage], action.kind)
    except (KeyError, IndexError, ValueError):
        raise ValueError(
            f"no duration for {action}: give durations[{action.stage}, {action.kind!r}] in seconds"
        ) from None
    if not 0.0 <= value < math.inf:
        raise ValueError(f"the duration of {action} must be a finite number of seconds, 0 or more, got {value}")
    return float(value)


def _of_stage(seconds: Sequence[float], kind: str) -> float:
    if len(seconds) == 2:
        forward, backward = seconds
        return forward if kind == "F" else backward if kind == "B" else backward / 2
    forward, inputs, weights = seconds
    return {"F": forward, "B": inputs + weights, "I": inputs, "W": weights}[kind]


def run_flat(
    first: list[int],
    stages: list[int],
    kinds: list[int],
    microbatches: list[int],
    seconds: list[float],
    transfers: list[float],
) -> tuple[list[float], list[float]]:
    """Return (starts, ends) of every action, seconds, NaN for those that can never start: the simulator itself.

    The definition of what ``csrc/host/simulate.cpp`` computes: the same sums and maxima in the same order.
    """
    ranks, last = len(first) - 1, len(transfers)
    columns = max(microbatches, default=-1) + 1
    count = len(kinds)
    starts, ends = [math.nan] * count, [math.nan] * count
    # When the forward and the gradient of the input of [stage, microbatch] ended.
    forward = [math.nan] * ((last + 1) * columns)
    gradient = [math.nan] * ((last + 1) * columns)
    # When they had arrived at the next stage, and at the one before; and when the links there are free.
    sent_forward, sent_gradient = list(forward), list(forward)
    forward_link, backward_link = [0.0] * (last + 1), [0.0] * (last + 1)
    head, clock = list(first[:-1]), [0.0] * ranks
    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            while head[rank] < first[rank + 1]:
                k = head[rank]
                stage, kind = stages[k], KINDS[kinds[k]]
                cell = stage * columns + microbatches[k]
                ready = clock[rank]
                if kind == "F" and stage > 0:
                    ready = _later(ready, sent_forward[cell - columns])
                elif kind == "W":
                    ready = _later(ready, gradient[cell])
                elif kind in ("B", "I"):
                    ready = _later(ready, forward[cell])
                    if stage < last:
                        ready = _later(ready, sent_gradient[cell + columns])
                if math.isnan(ready):
                    break
                end = ready + seconds[k]
                starts[k], ends[k], clock[rank] = ready, end, end
                if kind == "F":
                    forward[cell] = end
                    if stage < last:
                        forward_link[stage] = _later(end, forward_link[stage]) + transfers[stage]
                        sent_forward[cell] = forward_link[stage]
                elif kind != "W":
                    gradient[cell] = end
                    if stage > 0:
                        backward_link[stage] = _later(end, backward_link[stage]) + transfers[stage - 1]
                        sent_gradient[cell] = backward_link[stage]
                head[rank] += 1
                moved = True
    return starts, ends


def _later(a: float, b: float) -> float:
    """Return the later of two times; NaN, which means never, wins."""
    return b if math.isnan(b) or b > a else a
