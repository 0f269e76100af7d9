"""A timeline as a trace file that Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from spu.common.files import naming
from spu.plan.show.colors import WORDS
from spu.schedules import Timeline

__all__ = ["write_trace"]


def write_trace(timeline: Timeline, path: str | os.PathLike[str], predicted: Timeline | None = None) -> None:
    """Write Chrome trace events: a process per timeline, a thread per stage, a complete event ("X") per action.

    Args:
        timeline: what ran.
        path: file to write, JSON.
        predicted: shown as a second process; both start at time 0.
    """
    events = _events(timeline, 0, "measured" if predicted is not None else "pipeline")
    if predicted is not None:
        events += _events(predicted, 1, "predicted")
    with naming(path):
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def _events(timeline: Timeline, process: int, name: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}]
    for stage in range(timeline.stages):
        names = {"thread_name": {"name": f"stage {stage}"}, "thread_sort_index": {"sort_index": stage}}
        events += [
            {"ph": "M", "name": key, "pid": process, "tid": stage, "args": value} for key, value in names.items()
        ]
    for span in timeline.shifted().spans:
        events.append(
            {
                "ph": "X",
                "name": f"{span.kind}{span.microbatch}",
                "cat": WORDS.get(span.kind, span.kind),
                "pid": process,
                "tid": span.stage,
                "ts": span.start * 1e6,  # microseconds
                "dur": span.seconds * 1e6,
                "args": {"stage": span.stage, "kind": span.kind, "microbatch": span.microbatch},
            }
        )
    return events
