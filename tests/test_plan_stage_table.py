"""The tables of the search: bounds of what a stage's account says, and as little recompute as the budget asks for."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spu import schedules
from spu.devices.manager import Device
from spu.plan import stage_table
from spu.plan.layer_cost import LayerCost
from spu.plan.machine import Machine, Speed
from spu.plan.request import Request
from spu.settings import Settings

small = st.integers(0, 20)


@st.composite
def costs(draw, name, layers_before):
    names = ("own_bytes", "input_bytes", "output_bytes", "forward_extra_bytes", "backward_extra_bytes")
    numbers = {key: draw(small) for key in (*names, "deferred_bytes")}
    flags = {key: draw(st.booleans()) for key in ("input_saved", "output_saved")}
    count = draw(st.integers(0, 3))
    ties = ((draw(st.integers(0, layers_before - 1)), 2, 2),) if layers_before and draw(st.booleans()) else ()
    return LayerCost(name=name, param_count=count, trained_count=count, ties=ties, **numbers, **flags)


@st.composite
def requests(draw):
    schedule = draw(st.sampled_from(schedules.names()))
    ranks = draw(st.integers(1, 3))
    stages = ranks * schedules.stages_per_rank(schedule)
    count = draw(st.integers(stages, stages + 4))
    layers = [draw(costs(f"layers.{k}", k)) for k in range(count)]
    layers = [replace(layer, input_bytes=before.output_bytes) for layer, before in zip(layers, [layers[0], *layers])]
    names = [f"{draw(st.sampled_from(['cpu', 'cuda']))}:{k}" for k in range(ranks)]
    devices = [Device(n, torch.device(n[:-2]), (), 1, 10**6, draw(st.integers(50, 900)), "made up") for n in names]
    machine = Machine(tuple(devices), (Speed(1.0, 1.0),) * ranks)
    times = [[(float(draw(st.integers(0, 9))), float(draw(st.integers(0, 9)))) for _ in range(count + 1)]] * ranks
    chosen = Settings(schedule=schedule, microbatches=6, recompute=draw(st.sampled_from(["auto", True, False])))
    return Request(
        machine, tuple(range(ranks)), tuple(layers), draw(costs("loss", 0)), times, chosen, ("none",) * (stages - 1)
    )


def every_cuts(request):
    for inner in itertools.combinations(range(1, len(request.layers)), len(request.ranks) - 1):
        yield [0, *inner, len(request.layers)]


def total(request, stage, first, stop, recomputed):
    held = request.memory.of(stage, first, stop, recomputed)
    return held.total_bytes


@given(requests())
@settings(max_examples=100, deadline=None)
def test_a_table_bounds_the_account_and_says_the_seconds(request):
    for table, stage in zip(request.tables, range(len(request.ranks))):
        fitting, lacking = table.fitting(), table.lacking()
        budget = request.budgets[request.ranks[stage]] // request.settings.stages_per_rank
        for cuts in itertools.islice(every_cuts(request), 8):
            first, stop = cuts[stage], cuts[stage + 1]
            recomputed = table.recomputed(first, stop)
            assert total(request, stage, first, stop, recomputed) <= lacking[first, stop] + budget
            if lacking[first, stop] > 0:
                assert math.isinf(fitting[first, stop])
                continue
            seconds = sum(request.placed(cuts).durations[stage])
            assert fitting[first, stop] == pytest.approx(seconds)


@given(requests())
@settings(max_examples=60, deadline=None)
def test_recomputing_on_demand_recomputes_only_what_it_must(request):
    auto, keep = request.changed(recompute="auto"), request.changed(recompute=False)
    for stage, (table, kept) in enumerate(zip(auto.tables, keep.tables)):
        for cuts in itertools.islice(every_cuts(request), 5):
            first, stop = cuts[stage], cuts[stage + 1]
            recomputed = table.recomputed(first, stop)
            if kept.lacking()[first, stop] <= 0:
                assert recomputed == ()
            elif table.lacking()[first, stop] <= 0:
                assert set(recomputed) <= set(range(first, stop))
                assert recomputed != ()


def one_stage(budget, forward, own, recompute="auto"):
    layers = tuple(LayerCost(name=f"{k}", own_bytes=size) for k, size in enumerate(own))
    device = Device("cpu:0", torch.device("cpu"), (), 1, 10**6, budget, "made up")
    times = [[*((seconds, 1.0) for seconds in forward), (0.0, 0.0)]]
    chosen = Settings(schedule="gpipe", microbatches=2, recompute=recompute)
    machine = Machine((device,), (Speed(1.0, 1.0),))
    return Request(machine, (0,), layers, LayerCost(name="loss"), times, chosen, ())


def test_the_fewest_seconds_are_recomputed_first():
    for budget, chosen, seconds in ((104, (), 7.0), (80, (1,), 9.0), (50, (1, 2), 10.0), (30, (0, 1, 2), 11.0)):
        (table,) = one_stage(budget, [1.0, 2.0, 1.0], [10, 30, 12]).tables
        assert table.recomputed(0, 3) == chosen  # 15 bytes a second, then 12, then 10
        assert table.fitting()[0, 3] == seconds
    (table,) = one_stage(29, [1.0, 2.0, 1.0], [10, 30, 12]).tables
    assert table.lacking()[0, 3] == 1  # whatever is recomputed, its activations are there once
    assert math.isinf(table.fitting()[0, 3])


def test_large_models_are_weighed_a_part_at_a_time(monkeypatch):
    request = one_stage(10**4, [1.0] * 40, [100 + k for k in range(40)])
    (whole,) = request.tables
    monkeypatch.setattr(stage_table, "_MOST_CELLS", 100)
    parts = stage_table.StageTable(request, 0, 10**4)
    assert (whole.fitting() == parts.fitting()).all()
    assert (whole.lacking() == parts.lacking()).all()
