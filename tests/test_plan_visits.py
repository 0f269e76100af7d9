"""The clock of a streamed step: what each visit waits for, against times worked out by hand."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spu.plan.visits import RESOURCES, Visit, simulate_visits


def step(forward, backward, stages=3):
    """Forwards and backwards of stages that are alike; the last `slots` backwards find their weights."""
    there = {"fetches": False, "read_s": 0.0, "in_s": 0.0}
    order = [(k, True) for k in range(stages)] + [(k, False) for k in reversed(range(stages))]
    return [
        Visit(
            **{
                "stage": k,
                "forward": ahead,
                "fetches": True,
                "updates": ahead,
                **(forward if ahead else backward),
                **(there if not ahead and k >= stages - 2 else {}),
            }
        )
        for k, ahead in order
    ]


def spans(busy, resource):
    own = sorted((b for b in busy if b.resource == resource), key=lambda b: b.start)
    return [(b.visit, pytest.approx(b.start), pytest.approx(b.end)) for b in own]


def end(busy):
    return max(b.end for b in busy)


def test_only_the_first_fetch_of_a_slower_compute_is_waited_for():
    visits = step({"read_s": 1.0, "compute_s": 4.0}, {"read_s": 1.0, "compute_s": 8.0})
    busy = simulate_visits([Visit(**{**vars(v), "updates": False}) for v in visits], 2, 2)
    assert spans(busy, "compute") == [(0, 1, 5), (1, 5, 9), (2, 9, 13), (3, 13, 21), (4, 21, 29), (5, 29, 37)]
    # One slot ahead: stage 2 comes when stage 0 has left its slot, stage 0 when the backward of stage 2 has.
    assert spans(busy, "disk") == [(0, 0, 1), (1, 1, 2), (2, 5, 6), (5, 21, 22)]


def test_a_slower_disk_is_never_idle_but_for_the_slots():
    visits = step({"read_s": 4.0, "written_s": 4.0, "compute_s": 1.0}, {"compute_s": 1.0, "written_s": 2.0})
    busy = simulate_visits(visits, 2, 2)
    # Visit 2 reads into the state slot that visit 0 has left when it is written.
    assert spans(busy, "disk")[:5] == [(0, 0, 4), (1, 4, 8), (0, 8, 12), (1, 12, 16), (2, 16, 20)]
    assert end(busy) == pytest.approx(3 * 8 + 1 + 1 + 3 * 2 + 1, abs=3.0)


def test_a_host_updates_and_copies_a_stage_after_the_other_when_its_slot_is_free():
    visits = step({"update_s": 1.0, "in_s": 1.0, "compute_s": 6.0}, {"in_s": 1.0, "compute_s": 6.0, "out_s": 1.0})
    busy = simulate_visits(visits, 2, 2)
    assert spans(busy, "host update") == [(0, 0, 1), (1, 2, 3), (2, 8, 9)]
    assert spans(busy, "link in") == [(0, 1, 2), (1, 3, 4), (2, 9, 10), (5, 26, 27)]
    assert spans(busy, "link out") == [(3, 26, 27), (4, 32, 33), (5, 38, 39)]
    assert end(busy) == 39


def test_a_backward_waits_for_a_gradient_slot():
    visits = step({"compute_s": 1.0, "updates": False}, {"compute_s": 1.0, "out_s": 10.0})
    assert spans(simulate_visits(visits, 2, 1), "compute")[3:] == [(3, 3, 4), (4, 14, 15), (5, 25, 26)]
    assert spans(simulate_visits(visits, 2, 2), "compute")[3:] == [(3, 3, 4), (4, 4, 5), (5, 14, 15)]


seconds = st.integers(0, 100).map(lambda tenths: tenths / 10)
parts = st.fixed_dictionaries(dict.fromkeys(("read_s", "update_s", "in_s", "compute_s", "out_s", "written_s"), seconds))


@given(parts, parts, st.integers(1, 6), st.integers(2, 4), st.integers(1, 2))
def test_no_resource_does_two_things_at_a_time_and_no_step_beats_its_bottleneck(
    forward, backward, stages, slots, state_slots
):
    visits = step(forward, backward, stages)
    busy = simulate_visits(visits, slots, state_slots)
    for name in RESOURCES:
        own = sorted((b.start, b.end) for b in busy if b.resource == name)
        assert all(after[0] >= before[1] - 1e-9 for before, after in itertools.pairwise(own))
        assert sum(e - s for s, e in own) == pytest.approx(sum(v.seconds[name] for v in visits))
        assert sum(e - s for s, e in own) <= end(busy) + 1e-9
