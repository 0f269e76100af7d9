"""The partition of layers whose work alone counts: equal to brute force."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spu.plan import partition
from spu.plan.partition import best_cuts, minimise, runs


def every_partition(layers, stages):
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        ends = [0, *cuts, layers]
        yield [range(a, b) for a, b in itertools.pairwise(ends)]


sizes = st.integers(1, 4).flatmap(lambda stages: st.tuples(st.integers(stages, 8), st.just(stages)))


def test_equal_layers_are_shared_out_evenly():
    assert partition([1.0] * 8, 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]


def test_a_dear_layer_stands_alone():
    assert partition([1, 1, 1, 9, 1, 1], 3) == [range(0, 3), range(3, 4), range(4, 6)]


def test_of_equally_slow_partitions_the_most_even_is_taken():
    assert partition([4, 1, 1, 1, 1], 3) == [range(0, 1), range(1, 3), range(3, 5)]


@given(st.data(), sizes)
@settings(max_examples=120)
def test_equals_brute_force(data, size):
    layers, stages = size
    costs = data.draw(st.lists(st.integers(0, 20), min_size=layers, max_size=layers))

    def sums(parts):
        return [sum(costs[k] for k in part) for part in parts]

    ours = partition(costs, stages)
    assert [k for part in ours for k in part] == list(range(layers))
    slowest = min(max(sums(parts)) for parts in every_partition(layers, stages))
    assert max(sums(ours)) == slowest, f"{ours} is not the best"
    even = [sums(parts) for parts in every_partition(layers, stages) if max(sums(parts)) == slowest]
    assert sum(v * v for v in sums(ours)) == min(sum(v * v for v in row) for row in even)


def test_what_makes_no_sense_is_named():
    with pytest.raises(ValueError, match="3 stages need at least 3 layers, got 2: use 2 or fewer stages"):
        partition([1, 1], 3)
    with pytest.raises(ValueError, match="stages must be at least 1, got 0"):
        partition([1, 1], 0)
    with pytest.raises(ValueError, match=r"costs\[1\] must be a finite number, 0 or more, got nan"):
        partition([1, math.nan], 1)


def test_eighty_layers_on_eight_devices_take_under_a_second():
    start = time.perf_counter()
    partition([1.0 + k % 3 for k in range(80)], 8)
    assert time.perf_counter() - start < 1.0


@given(st.data(), sizes)
@settings(max_examples=120, deadline=None)
def test_tables_with_stages_that_do_not_fit_equal_brute_force(data, size):
    layers, stages = size
    values = st.lists(st.integers(0, 9), min_size=(layers + 1) ** 2, max_size=(layers + 1) ** 2)
    full = [np.array(data.draw(values), dtype=np.float64).reshape(layers + 1, -1) for _ in range(stages)]
    tables = [np.where(runs(layers) & (table < 7), table, math.inf) for table in full]

    def own(parts):
        return [table[part.start, part.stop] for table, part in zip(tables, parts, strict=True)]

    fitting = [row for parts in every_partition(layers, stages) if max(row := own(parts)) < math.inf]
    found = [own([range(a, b) for a, b in itertools.pairwise(cuts)]) for cuts in best_cuts(tables, [1.0, math.inf])]
    if not fitting:
        assert found == []
        return
    slowest = min(map(max, fitting))
    assert max(found[0]) == slowest
    assert sum(v * v for v in found[0]) == min(sum(v * v for v in row) for row in fitting if max(row) <= slowest)
    assert min(map(sum, found)) == min(map(sum, fitting))
    smallest, cuts = minimise([np.where(runs(layers), table, math.inf) for table in full], np.maximum)
    every = [max(t[p.start, p.stop] for t, p in zip(full, parts)) for parts in every_partition(layers, stages)]
    assert smallest == min(every)
    assert (cuts[0], cuts[-1]) == (0, layers)
