"""The trace file: Chrome trace events with the spans of the timeline."""

from __future__ import annotations

import json

import pytest

from spu.plan import write_trace
from spu.schedules import Timeline, one_f_one_b, simulate


def events(path, phase):
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == phase]


def test_every_span_is_a_complete_event_in_microseconds(tmp_path):
    timeline = simulate(one_f_one_b(3, 4), [(0.001, 0.002)] * 3, 0.0005)
    moved = Timeline.from_spans(s._replace(start=s.start + 100.0, end=s.end + 100.0) for s in timeline.spans)
    write_trace(moved, tmp_path / "trace.json")
    found = events(tmp_path / "trace.json", "X")
    assert len(found) == len(timeline.spans) == 24
    for span, event in zip(timeline.spans, found, strict=True):
        assert (event["pid"], event["tid"], event["name"]) == (0, span.stage, f"{span.kind}{span.microbatch}")
        assert event["ts"] == pytest.approx(span.start * 1e6, abs=0.1)
        assert event["dur"] == pytest.approx(span.seconds * 1e6, abs=0.1)
        assert event["args"] == {"stage": span.stage, "kind": span.kind, "microbatch": span.microbatch}
    assert {event["cat"] for event in found} == {"forward", "backward"}


def test_stages_and_timelines_have_names(tmp_path):
    timeline = simulate(one_f_one_b(2, 2), [(1.0, 2.0)] * 2)
    write_trace(timeline, tmp_path / "trace.json", predicted=timeline)
    named = {(e["name"], e["pid"], e.get("tid")): e["args"] for e in events(tmp_path / "trace.json", "M")}
    assert named["process_name", 0, None] == {"name": "measured"}
    assert named["process_name", 1, None] == {"name": "predicted"}
    assert named["thread_name", 1, 1] == {"name": "stage 1"}
    assert len(events(tmp_path / "trace.json", "X")) == 2 * len(timeline.spans)
