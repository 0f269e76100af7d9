"""The partition: equal to brute force, and refusals that are true."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spu.plan import BudgetError, partition
from spu.plan.partition import fastest, minimax


def every_partition(layers, stages):
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        ends = [0, *cuts, layers]
        yield [range(a, b) for a, b in itertools.pairwise(ends)]


sizes = st.integers(1, 4).flatmap(lambda stages: st.tuples(st.integers(stages, 8), st.just(stages)))


def test_equal_layers_are_shared_out_evenly():
    assert partition([1.0] * 8, 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]


def test_a_dear_layer_stands_alone():
    assert partition([1, 1, 1, 9, 1, 1], 3) == [range(0, 3), range(3, 4), range(4, 6)]


def test_a_device_of_twice_the_speed_takes_twice_the_work():
    assert partition([1.0] * 9, 2, speeds=[2.0, 1.0]) == [range(0, 6), range(6, 9)]


def test_a_budget_moves_the_boundary():
    assert partition([1.0] * 8, 2, memory=[10] * 8, budgets=[30, 60]) == [range(0, 3), range(3, 8)]


def test_a_dear_boundary_is_avoided():
    boundary = [0.0, 5.0, 0.0]
    assert partition([1.0] * 4, 2) == [range(0, 2), range(2, 4)]
    assert partition([1.0] * 4, 2, boundary=boundary) in ([range(0, 1), range(1, 4)], [range(0, 3), range(3, 4)])


def test_of_equally_slow_partitions_the_most_even_is_taken():
    assert partition([4, 1, 1, 1, 1], 3) == [range(0, 1), range(1, 3), range(3, 5)]


@given(st.data(), sizes)
@settings(max_examples=120)
def test_equals_brute_force_with_unequal_speeds_budgets_and_boundaries(data, size):
    layers, stages = size
    costs = data.draw(st.lists(st.integers(0, 20), min_size=layers, max_size=layers))
    memory = data.draw(st.lists(st.integers(0, 20), min_size=layers, max_size=layers))
    budgets = data.draw(st.lists(st.integers(0, 80), min_size=stages, max_size=stages))
    speeds = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=stages, max_size=stages))
    boundary = data.draw(st.lists(st.integers(0, 5), min_size=layers - 1, max_size=layers - 1))
    cuts = [0, *boundary, 0]

    def slowest(parts):  # exact: powers of two divide small integers
        return max(
            sum(costs[k] for k in p) / v + cuts[p.start] + cuts[p.stop] for p, v in zip(parts, speeds, strict=True)
        )

    def lacking(parts):
        return max(sum(memory[k] for k in p) - b for p, b in zip(parts, budgets, strict=True))

    fitting = [parts for parts in every_partition(layers, stages) if lacking(parts) <= 0]
    arguments = {"speeds": speeds, "memory": memory, "budgets": budgets, "boundary": boundary}
    if fitting:
        ours = partition(costs, stages, **arguments)
        assert lacking(ours) <= 0
        assert [k for part in ours for k in part] == list(range(layers))
        assert slowest(ours) == min(map(slowest, fitting)), f"{ours} is not the fastest"
    else:
        with pytest.raises(BudgetError) as error:
            partition(costs, stages, **arguments)
        assert error.value.short_bytes == min(map(lacking, every_partition(layers, stages)))


@given(st.data(), sizes)
@settings(max_examples=60)
def test_costs_that_depend_on_the_stage_equal_brute_force_too(data, size):
    layers, stages = size
    table = {
        (s, i, j): data.draw(st.integers(0, 30))
        for s in range(stages)
        for i in range(layers)
        for j in range(i + 1, layers + 1)
    }

    def cost(stage, first, last):
        return table[stage, first, last]

    def dearest(parts):
        return max(cost(s, part.start, part.stop) for s, part in enumerate(parts))

    value, parts = minimax(layers, stages, cost)
    assert value == dearest(parts) == min(map(dearest, every_partition(layers, stages)))
    assert fastest(layers, stages, cost, lambda *_: False) is None


@given(st.data(), sizes)
@settings(max_examples=60)
def test_the_budgets_that_a_refusal_proposes_do_fit(data, size):
    layers, stages = size
    memory = data.draw(st.lists(st.integers(1, 10**9), min_size=layers, max_size=layers))
    budgets = data.draw(st.lists(st.integers(0, 10**9), min_size=stages, max_size=stages))
    try:
        partition([1.0] * layers, stages, memory=memory, budgets=budgets)
    except BudgetError as error:
        # Raising every budget by what the worst one lacks is enough, and one byte less on all is not.
        enough = [budget + error.short_bytes for budget in budgets]
        partition([1.0] * layers, stages, memory=memory, budgets=enough)
        with pytest.raises(BudgetError):
            partition([1.0] * layers, stages, memory=memory, budgets=[max(budget - 1, 0) for budget in enough])


def test_a_refusal_names_the_stage_the_bytes_and_the_budget_that_would_do():
    with pytest.raises(BudgetError) as error:
        partition([1.0] * 4, 2, memory=[1000] * 4, budgets=[2500, 1500])
    text = str(error.value)
    assert "stage 1 needs 2.00 kB for layers 2 to 3 and may use 1.50 kB: short by 500 B" in text
    assert "stage 0" not in text
    assert "budgets of 2.00 kB for stage 1" in text
    assert (error.value.stage, error.value.needed_bytes, error.value.budget_bytes) == (1, 2000, 1500)


def test_what_makes_no_sense_is_named():
    with pytest.raises(ValueError, match="3 stages need at least 3 layers, got 2: use 2 or fewer stages"):
        partition([1, 1], 3)
    with pytest.raises(ValueError, match="stages must be at least 1, got 0"):
        partition([1, 1], 0)
    with pytest.raises(ValueError, match=r"costs\[1\] must be a finite number, 0 or more, got nan"):
        partition([1, math.nan], 1)
    with pytest.raises(ValueError, match="speeds must have one value per stage, 2, got 1"):
        partition([1, 1], 2, speeds=[1])
    with pytest.raises(ValueError, match="speeds must be above 0"):
        partition([1, 1], 2, speeds=[1, 0])
    with pytest.raises(ValueError, match="memory and budgets go together"):
        partition([1, 1], 2, memory=[1, 1])
    with pytest.raises(ValueError, match="memory must have one value per layer, 2, got 1"):
        partition([1, 1], 2, memory=[1], budgets=[1, 1])
    with pytest.raises(ValueError, match="boundary must have one value per place between two layers, 1, got 2"):
        partition([1, 1], 2, boundary=[1, 1])


def test_eighty_layers_on_eight_devices_take_under_a_second():
    import time

    start = time.perf_counter()
    partition([1.0 + k % 3 for k in range(80)], 8, memory=[1] * 80, budgets=[12] * 8)
    assert time.perf_counter() - start < 1.0
