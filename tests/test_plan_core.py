"""The exact programme: equal to brute force over boundaries, equal in Python and C++."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spu.plan import core

small = st.integers(0, 20)


@st.composite
def problems(draw, most_layers=7):
    stages = draw(st.integers(1, 4))
    layers = draw(st.integers(stages, most_layers))

    def numbers(count, kind=small):
        return draw(st.lists(kind, min_size=count, max_size=count))

    per_layer, ends = {name: numbers(layers) for name in core.LAYER_BYTES}, stages * (layers + 1)
    # Recomputing needs no less workspace.
    per_layer["extra_recomputed"] = [max(a, b) for a, b in zip(per_layer["extra"], per_layer["extra_recomputed"])]
    seconds = st.integers(0, 9).map(float)
    return core.Problem(
        layers=layers,
        stages=stages,
        recompute=draw(st.sampled_from([core.NONE, core.ALL, core.AUTO])),
        forward=numbers(stages * layers, seconds),
        backward=numbers(stages * layers, seconds),
        in_flight=numbers(stages, st.integers(1, 3)),
        budgets=numbers(stages, st.integers(20, 300)),
        enter_s=numbers(ends, seconds),
        leave_s=numbers(ends, seconds),
        **per_layer,
        **{name: numbers(ends) for name in core.END_BYTES},
    )


def one_stage(layers, **given):
    """A problem of one stage in which only what is given is not zero."""
    zeros = {name: [0] * layers for name in core.LAYER_BYTES} | {name: [0] * (layers + 1) for name in core.END_BYTES}
    zeros |= {"enter_s": [0.0] * (layers + 1), "leave_s": [0.0] * (layers + 1), "backward": [1.0] * layers}
    return core.Problem(layers=layers, stages=1, **{**zeros, "in_flight": [1], **given})


def choices(p, cuts):
    scale = core.StageCosts(p)
    return [scale.weigh(s, cuts[s], cuts[s + 1]) for s in range(p.stages)]


def every_cuts(p):
    for inner in itertools.combinations(range(1, p.layers), p.stages - 1):
        yield [0, *inner, p.layers]


@given(problems())
@settings(max_examples=120, deadline=None)
def test_partitions_equal_brute_force(p):
    weighed = [(cuts, choices(p, cuts)) for cuts in every_cuts(p)]
    fitting = [
        [c.seconds for c in own]
        for _, own in weighed
        if all(c.needed <= b for c, b in zip(own, p.budgets, strict=True))
    ]
    found = core.place(p, [1.0, 1.5, math.inf], "python")
    if not fitting:
        assert found == []
        lacks = [max(c.needed - b for c, b in zip(own, p.budgets)) for _, own in weighed]
        nearest = choices(p, core.nearest(p, "python"))
        assert max(c.needed - b for c, b in zip(nearest, p.budgets)) == min(lacks)
        return
    own = [[c.seconds for c in choices(p, cuts)] for cuts in found]
    slowest = min(map(max, fitting))
    assert max(own[0]) == slowest
    assert sum(v * v for v in own[0]) == min(sum(v * v for v in row) for row in fitting if max(row) <= slowest)
    assert min(map(sum, own)) == min(map(sum, fitting))


@given(problems(most_layers=10))
@settings(max_examples=120, deadline=None)
def test_python_and_cpp_find_the_same(p):
    pytest.importorskip("spu._host")
    slacks = [1.0, 1.25, 2.0, math.inf]
    assert core.place(p, slacks, "cpp") == core.place(p, slacks, "python")
    assert core.nearest(p, "cpp") == core.nearest(p, "python")


@given(problems())
@settings(max_examples=80, deadline=None)
def test_recomputing_on_demand_recomputes_no_more_than_it_must(p):
    auto, keep = (dataclasses.replace(p, recompute=kind) for kind in (core.AUTO, core.NONE))
    for cuts in itertools.islice(every_cuts(p), 5):
        for one, kept, budget in zip(choices(auto, cuts), choices(keep, cuts), p.budgets):
            if kept.needed <= budget:
                assert one == kept
            else:
                assert one.recomputed == [] or one.seconds >= kept.seconds


def test_the_fewest_seconds_are_recomputed_first():
    p = one_stage(3, recompute=core.AUTO, forward=[1.0, 2.0, 1.0], own=[10, 30, 12], budgets=[42])
    (choice,) = choices(p, [0, 3])
    assert choice.needed <= 42
    assert choice.recomputed == [1]  # 15 bytes a second, against 12 and 10


def test_arrays_that_do_not_fit_together_are_refused():
    host = pytest.importorskip("spu._host")
    p = one_stage(1, recompute=core.NONE, forward=[1.0], budgets=[9])
    assert host.best_cuts(p, [1.0]) == [[0, 1]]
    with pytest.raises(ValueError, match="place: in_flight must have 1 values, got 2"):
        host.best_cuts(dataclasses.replace(p, in_flight=[1, 2]), [])
    with pytest.raises(ValueError, match="place: 2 stages of 1 layers"):
        host.nearest_cuts(dataclasses.replace(p, stages=2))
    with pytest.raises(ValueError, match="backend must be 'auto', 'python' or 'cpp', got 'java'"):
        core.place(p, [], "java")
