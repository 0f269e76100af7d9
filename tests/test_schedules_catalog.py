"""Every schedule by name: it validates, it never deadlocks, it holds what it states, the simulators agree on it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spu import schedules
from spu.schedules import forward_only, peak_on_ranks, simulate, validate

HAVE_HOST = importlib.util.find_spec("spu._host") is not None
seconds = st.floats(0.0, 10.0, allow_subnormal=False)


@st.composite
def requests(draw):
    """(name, ranks, microbatches, virtual) of a schedule that there is."""
    name = draw(st.sampled_from(schedules.names()))
    any_number = name in ("interleaved", "layer_outer")
    virtual = draw(st.integers(1, 4)) if any_number else schedules.stages_per_rank(name)
    return name, draw(st.integers(1, 8)), draw(st.integers(1, 20)), virtual


def stated_bound(name: str, r: int, p: int, m: int, v: int) -> int:
    """The most microbatches of a stage that rank r of p holds, with v stages on each rank (docs/schedules.md)."""
    if name == "interleaved" and v > 1:
        return min(m * v, 2 * (p - r - 1) + (v - 1) * p + 1)
    if name == "layer_outer":
        return m * v if r < p - 1 else m * (v - 1) + 1
    return {"gpipe": m, "zb": min(m, p), "zbv": min(2 * m, 2 * p)}.get(name, min(m, p - r))


@given(requests())
@settings(max_examples=200, deadline=None)
def test_it_validates_does_everything_once_and_holds_no_more_than_stated(request):
    name, ranks, microbatches, virtual = request
    actions = schedules.get(name)(ranks, microbatches, virtual=virtual)
    homes = schedules.stage_ranks(name, ranks, virtual)
    validate(actions, ranks, microbatches, stage_ranks=homes)
    kinds = "FIW" if schedules.splits_backward(name) else "FB"
    everything = [(s, k, i) for s in range(ranks * virtual) for k in kinds for i in range(microbatches)]
    assert sorted(a for row in actions for a in row) == sorted(everything)
    assert schedules.ranks_of(actions) == homes
    bound = [stated_bound(name, rank, ranks, microbatches, virtual) for rank in range(ranks)]
    peaks = peak_on_ranks(actions)
    assert all(peak <= most for peak, most in zip(peaks, bound, strict=True)), f"{peaks} in flight, stated {bound}"
    assert name not in ("gpipe", "1f1b") or peaks == bound  # no less, either: they hold what they can
    passes = forward_only(ranks, microbatches, stage_ranks=homes)
    validate(passes, ranks, microbatches, stage_ranks=homes, forward_only=True)


@given(requests(), st.data())
@settings(max_examples=60, deadline=None)
def test_it_ends_whatever_actions_and_transfers_take(request, data):
    name, ranks, microbatches, virtual = request
    actions = schedules.get(name)(ranks, microbatches, virtual=virtual)
    stages = ranks * virtual
    durations = data.draw(st.lists(st.tuples(seconds, seconds, seconds), min_size=stages, max_size=stages))
    links = data.draw(st.lists(seconds, min_size=stages - 1, max_size=stages - 1))
    timeline = simulate(actions, durations, links, backend="python")
    assert len(timeline.spans) == sum(map(len, actions))
    assert timeline.makespan >= max(timeline.busy) - 1e-9
    if HAVE_HOST:
        assert simulate(actions, durations, links, backend="cpp") == timeline


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [2, 3])
def test_equal_stages_take_the_stated_time(ranks: int, rounds: int):
    """F, I and W take 1 each, so B takes 2; every rank has the same work, whatever its number of stages."""
    microbatches = rounds * ranks

    def makespan(name: str, virtual: int = 1) -> float:
        actions = schedules.get(name)(ranks, microbatches, virtual=virtual)
        return simulate(actions, [(1.0, 1.0, 1.0)] * (ranks * virtual)).makespan

    assert makespan("gpipe") == makespan("1f1b") == 3 * (microbatches + ranks - 1)
    assert makespan("interleaved", 2) == makespan("layer_outer", 2) == 3 * (2 * microbatches + ranks - 1)
    assert makespan("interleaved", 3) == makespan("layer_outer", 3) == 3 * (3 * microbatches + ranks - 1)
    assert makespan("zb") == 3 * microbatches + ranks - 1
    assert makespan("zbv", 2) == 6 * microbatches + ranks - 1


def test_a_boundary_inside_a_rank_takes_no_time_unless_it_is_said():
    actions = schedules.zbv(2, 1)  # stages 1 and 2 are both on rank 1
    durations = [(1.0, 1.0, 1.0)] * 4
    assert simulate(actions, durations, 0.5).makespan == simulate(actions, durations, [0.5, 0.0, 0.5]).makespan
    assert simulate(actions, durations, [0.5, 0.5, 0.5]).makespan > simulate(actions, durations, 0.5).makespan


def test_names_ranks_and_numbers_of_stages():
    assert schedules.names() == ["gpipe", "1f1b", "interleaved", "zb", "zbv", "layer_outer"]
    assert schedules.get("1f1b") is schedules.one_f_one_b
    assert schedules.stage_ranks("1f1b", 3) == [0, 1, 2]
    assert schedules.stage_ranks("interleaved", 2, 3) == [0, 1, 0, 1, 0, 1]
    assert schedules.stage_ranks("zbv", 3) == [0, 1, 2, 2, 1, 0]
    assert [schedules.stages_per_rank(name) for name in schedules.names()] == [1, 1, 2, 1, 2, 1]
    with pytest.raises(ValueError, match="unknown schedule '1F1B'; there are 'gpipe', '1f1b', 'interleaved'"):
        schedules.get("1F1B")


@pytest.mark.parametrize(
    ("name", "virtual", "own"), [("gpipe", 2, "1 stage "), ("zb", 3, "1 stage "), ("zbv", 1, "2 stages ")]
)
def test_a_number_of_stages_that_a_schedule_cannot_have_is_refused(name: str, virtual: int, own: str):
    with pytest.raises(ValueError, match=f"'{name}' has {own}on each rank.*any number goes with 'interleaved'"):
        schedules.stages_per_rank(name, virtual)
    with pytest.raises(ValueError, match=f"virtual.*got {virtual}"):
        schedules.get(name)(2, 4, virtual=virtual)


@pytest.mark.parametrize("make", [*map(schedules.get, schedules.names()), forward_only])
def test_counts_must_be_positive_integers(make: Callable[..., object]):
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        make(0, 4)
    with pytest.raises(ValueError, match="microbatches must be at least 1, got -2"):
        make(2, -2)
    with pytest.raises(TypeError, match=r"microbatches must be an int, got 2\.0"):
        make(2, 2.0)
    with pytest.raises(TypeError, match="ranks must be an int, got True"):
        make(True, 4)
    if make in (schedules.interleaved, schedules.layer_outer):
        with pytest.raises(ValueError, match="virtual must be at least 1, got 0"):
            make(2, 4, virtual=0)


def test_schedules_import_no_torch():
    code = "import sys, spu.schedules; sys.exit(any(name.split('.')[0] == 'torch' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
