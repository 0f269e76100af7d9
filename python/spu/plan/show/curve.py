"""The bytes that each device holds over time: a plan's, along a predicted or a measured timeline."""

from __future__ import annotations

from itertools import accumulate

from spu.plan.in_flight import Held, words_of_peak
from spu.plan.plan import Plan
from spu.schedules import Action

__all__ = ["memory_curve", "peak_moment"]


def memory_curve(plan: Plan) -> list[list[tuple[float, int]]]:
    """Return the bytes held on each device from each change on, as predicted.

    State and wires, or a streamed plan's slots, are there all the time; each microbatch in flight adds what its stage
    keeps, from the start of its forward to the end of its backward, and what a deferred weight gradient keeps until
    that is done; forwards and backwards add their stage's workspace while they run.

    Returns:
        One list per device, in the order of ``plan.devices``, of (seconds, bytes), by time.
    """
    timeline = plan.timeline().shifted()
    ranks = {name: rank for rank, name in enumerate(plan.devices)}
    rank_of = [ranks[stage.device] for stage in plan.stages]
    changes: list[list[tuple[float, int, int]]] = [[] for _ in ranks]  # (when, frees first, bytes)
    opened: set[tuple[int, int]] = set()
    for span in timeline.spans:
        stage, key = plan.stages[span.stage], (span.stage, span.microbatch)
        own = changes[rank_of[span.stage]]
        if key not in opened:
            opened.add(key)
            own.append((span.start, 1, stage.each_bytes))
        if span.kind == "W":
            own.append((span.end, 0, -stage.left_bytes))
            continue
        own += [(span.start, 1, stage.workspace_bytes), (span.end, 0, -stage.workspace_bytes)]
        if span.kind != "F":
            left = stage.left_bytes if span.kind == "I" else 0
            own.append((span.end, 0, left - stage.each_bytes))
    curves = []
    for rank, own in enumerate(changes):
        held = sum(stage.state_bytes + stage.wire_bytes for stage, k in zip(plan.stages, rank_of) if k == rank)
        if plan.streaming is not None:  # what is no activation: slots, and what waits on its way
            held = plan.predicted.peak_bytes[rank] - max(accumulate((n for _, _, n in sorted(own)), initial=0))
        curve = {0.0: held}
        for when, _, count in sorted(own):
            curve[when] = held = held + count
        curves.append(list(curve.items()))
    return curves


def peak_moment(plan: Plan, rank: int) -> str:
    """Return in words when a device holds most: the action that runs then."""
    stages = plan.stages

    def size(action: Action, held: Held) -> int:
        own, beside = stages[action.stage], sum(n * stages[s].each_bytes + m * stages[s].left_bytes for s, n, m in held)
        return beside + (own.left_bytes if action.kind == "W" else own.each_bytes + own.workspace_bytes)

    return words_of_peak(plan.actions()[rank], size)
