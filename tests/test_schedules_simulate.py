"""The simulator: closed forms, hand-made cases, and the C++ one equal to the Python one bit for bit."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spu
from spu.schedules import Action, ScheduleError, Span, Timeline, forward_only, gpipe, one_f_one_b, parse_grid, simulate
from spu.schedules.simulate import flatten, run_flat

HAVE_HOST = importlib.util.find_spec("spu._host") is not None
needs_host = pytest.mark.skipif(not HAVE_HOST, reason="spu._host is not built")
BACKENDS = ["python", pytest.param("cpp", marks=needs_host)]
seconds = st.floats(0.0, 10.0, allow_subnormal=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [gpipe, one_f_one_b])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("microbatches", [1, 2, 7])
def test_equal_stages_take_the_closed_form(make, stages, microbatches, backend):
    forward, backward = 2.0, 5.0
    timeline = simulate(make(stages, microbatches), [(forward, backward)] * stages, backend=backend)
    assert timeline.makespan == (microbatches + stages - 1) * (forward + backward)
    assert timeline.idle_share == pytest.approx((stages - 1) / (microbatches + stages - 1), abs=1e-12)
    assert timeline.busy == [microbatches * (forward + backward)] * stages


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_timeline_worked_out_by_hand(backend):
    durations = {(0, "F"): 1.0, (0, "B"): 2.0, (1, "F"): 3.0, (1, "B"): 4.0}
    timeline = simulate(one_f_one_b(2, 2), durations, transfers=0.5, backend=backend)
    assert timeline == Timeline(2, (
        Span(0, "F", 0, 0.0, 1.0), Span(0, "F", 1, 1.0, 2.0), Span(0, "B", 0, 9.0, 11.0), Span(0, "B", 1, 16.0, 18.0),
        Span(1, "F", 0, 1.5, 4.5), Span(1, "B", 0, 4.5, 8.5), Span(1, "F", 1, 8.5, 11.5), Span(1, "B", 1, 11.5, 15.5),
    ))  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_split_backward_frees_the_stage_before(backend):
    durations = {(s, k): {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}[k] for s in range(2) for k in "FIWB"}
    whole = simulate(parse_grid("0F0 0B0\n1F0 1B0"), durations, backend=backend)
    split = simulate(parse_grid("0F0 0I0 0W0\n1F0 1I0 1W0"), durations, backend=backend)
    assert (whole.makespan, split.makespan) == (6.0, 5.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_slow_action_can_be_given_by_itself(backend):
    durations = {(0, "F"): 1.0, (1, "F"): 1.0, Action(0, "F", 1): 4.0}
    timeline = simulate(forward_only(2, 3), durations, backend=backend)
    assert [span.end for span in timeline.of(1)] == [2.0, 6.0, 7.0]


@needs_host
@given(st.data(), st.integers(1, 6), st.integers(1, 8), st.sampled_from([gpipe, one_f_one_b, forward_only]))
@settings(max_examples=150, deadline=None)
def test_cpp_equals_python_bit_for_bit(data, stages, microbatches, make):
    actions = make(stages, microbatches)
    durations = {action: data.draw(seconds) for row in actions for action in row}
    transfers = data.draw(st.lists(seconds, min_size=stages - 1, max_size=stages - 1))
    ours, theirs = (simulate(actions, durations, transfers, backend=name) for name in ("python", "cpp"))
    for a, b in zip(ours.spans, theirs.spans, strict=True):
        assert a == b, f"python {a}, cpp {b}"


@needs_host
@given(st.data(), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_cpp_equals_python_on_shuffled_schedules_deadlocks_included(data, stages, microbatches):
    from spu import _host

    actions = [data.draw(st.permutations(row)) for row in one_f_one_b(stages, microbatches)]
    durations = {action: data.draw(seconds) for row in actions for action in row}
    flat = flatten(actions, durations, data.draw(seconds))
    ours, theirs = run_flat(*flat), _host.simulate(*flat)
    for name, a, b in zip(("starts", "ends"), ours, theirs, strict=True):
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert x == y or (math.isnan(x) and math.isnan(y)), f"{name}[{k}]: python {x}, cpp {y}"


@given(st.data(), st.integers(1, 5), st.integers(1, 6), st.sampled_from([gpipe, one_f_one_b]))
@settings(max_examples=60)
def test_no_action_starts_before_its_inputs_or_while_its_stage_is_busy(data, stages, microbatches, make):
    actions = make(stages, microbatches)
    pairs = data.draw(st.lists(st.tuples(seconds, seconds), min_size=stages, max_size=stages))
    links = data.draw(st.lists(seconds, min_size=stages - 1, max_size=stages - 1))
    timeline = simulate(actions, pairs, links, backend="python")
    at = {span[:3]: span for span in timeline.spans}
    arrives = {}
    for stage, step in itertools.product(range(stages), (1, -1)):
        link, kind = 0.0, "F" if step > 0 else "B"
        for span in timeline.of(stage):
            if span.kind == kind and 0 <= stage + step < stages:  # one transfer at a time, in each direction
                link = max(span.end, link) + links[min(stage, stage + step)]
                arrives[stage + step, kind, span.microbatch] = link
    for row in actions:
        free = 0.0
        for stage, kind, i in row:
            inputs = [free]
            if kind == "F" and stage:
                inputs.append(arrives[stage, "F", i])
            if kind == "B" and stage < stages - 1:
                inputs.append(arrives[stage, "B", i])
            assert at[stage, kind, i].start == max(inputs), (stage, kind, i)
            free = at[stage, kind, i].end
    assert timeline.makespan >= max(timeline.busy) - 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_link_that_is_slower_than_the_stages_sets_the_pace(backend):
    timeline = simulate(forward_only(2, 4), [(1.0, 1.0)] * 2, transfers=3.0, backend=backend)
    assert [span.end for span in timeline.of(1)] == [5.0, 8.0, 11.0, 14.0]


def test_gpipe_and_1f1b_differ_in_what_they_hold_not_in_time():
    a, b = (simulate(make(4, 8), [(1.0, 2.0)] * 4) for make in (gpipe, one_f_one_b))
    assert a.makespan == b.makespan
    assert (a.peak_in_flight, b.peak_in_flight) == ([8, 8, 8, 8], [4, 3, 2, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_deadlock_is_an_error_that_shows_the_grid(backend):
    actions = parse_grid("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1")
    with pytest.raises(ScheduleError, match="<-- ERROR HERE: deadlock: 0B0 waits for 1B0"):
        simulate(actions, [(1.0, 1.0)] * 2, backend=backend)


def test_what_is_wrong_with_the_numbers_is_named():
    actions = gpipe(2, 1)
    with pytest.raises(ValueError, match=r"no duration for 1F0: give durations\[1, 'F'\]"):
        simulate(actions, {(0, "F"): 1.0, (0, "B"): 1.0})
    with pytest.raises(ValueError, match=r"no duration for 1F0"):
        simulate(actions, [(1.0, 1.0)])
    with pytest.raises(ValueError, match=r"the duration of 0F0 must be a finite .* got -1\.0"):
        simulate(actions, [(-1.0, 1.0)] * 2)
    with pytest.raises(ValueError, match=r"the duration of 0B0 must be a finite .* got nan"):
        simulate(actions, [(1.0, math.nan)] * 2)
    with pytest.raises(ValueError, match="2 stages have 1 boundaries, but transfers has 2 values"):
        simulate(actions, [(1.0, 1.0)] * 2, [0.0, 0.0])
    with pytest.raises(ValueError, match=r"transfers\[0\] must be a finite"):
        simulate(actions, [(1.0, 1.0)] * 2, math.inf)
    with pytest.raises(ValueError, match="backend must be 'auto', 'python' or 'cpp', got 'rust'"):
        simulate(actions, [(1.0, 1.0)] * 2, backend="rust")
    with pytest.raises(ScheduleError, match="-1F0 is no action"):
        simulate([[Action(-1, "F", 0)]], [(1.0, 1.0)] * 2)


@needs_host
@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (([], [], [], [], [], []), "first must hold at least one index"),
        (([0, 1], [0], [0], [], [1.0], []), "equally long, got 1, 1, 0 and 1"),
        (([0, 1], [], [0], [0], [1.0], []), "equally long, got 1, 0, 1 and 1"),
        (([0, 2], [0], [0], [0], [1.0], []), "first must ascend from 0 to the number of actions"),
        (([0, 1], [0], [4], [0], [1.0], []), r"kinds\[0\] is 4, not 0 to 3"),
        (([0, 1], [0], [0], [-1], [1.0], []), r"microbatches\[0\] is -1, not 0 to 16777215"),
        (([0, 1], [0], [0], [2**20], [1.0], [0.0] * 99), "not 0 to 167771, the most for 100 stages"),
        (([0, 1], [0], [0], [2**62], [1.0], []), r"microbatches\[0\] is 4611686018427387904, not 0 to"),
        (([0, 1], [1], [0], [0], [1.0], []), r"stages\[0\] is 1, not 0 to 0, the number of transfers"),
        (([0, 1], [-1], [0], [0], [1.0], [0.0]), r"stages\[0\] is -1, not 0 to 1"),
    ],
)
def test_the_cpp_simulator_refuses_arrays_that_do_not_fit(arrays, reason):
    from spu import _host

    with pytest.raises(ValueError, match=reason):
        _host.simulate(*arrays)


def test_without_the_host_module_auto_is_python_and_cpp_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "spu._host", None)  # importing it fails, as where no compiler was found
    monkeypatch.delattr(spu, "_host", raising=False)
    assert simulate(gpipe(2, 2), [(1.0, 2.0)] * 2) == simulate(gpipe(2, 2), [(1.0, 2.0)] * 2, backend="python")
    with pytest.raises(RuntimeError, match=r"spu\._host is not built: install with a C\+\+ compiler"):
        simulate(gpipe(2, 2), [(1.0, 2.0)] * 2, backend="cpp")


def test_an_empty_schedule_takes_no_time():
    assert simulate([], []).makespan == 0.0
    assert simulate([[], []], []).idle_share == 0.0
