"""The shuffled order: a permutation for any number of items, another one for any other seed and epoch."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spu.data.order import shuffled


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 3000), seed=st.integers(-(2**40), 2**63), epoch=st.integers(0, 10**6))
def test_every_item_comes_once(count: int, seed: int, epoch: int) -> None:
    order = shuffled(np.arange(count), count, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(count))
    some = np.arange(count)[::3]
    assert np.array_equal(shuffled(some, count, seed, epoch), order[::3]), "each place by itself"


def test_orders_differ_and_do_not_favour_a_place() -> None:
    count = 64
    orders = np.array([shuffled(np.arange(count), count, seed, epoch) for seed in range(40) for epoch in range(40)])
    assert len({tuple(order) for order in orders}) == len(orders)
    # Where an item lands: 1600 draws from 64 places; the standard deviation of the mean is 18.5 / 40 = 0.46
    assert abs(orders.mean(axis=0) - (count - 1) / 2).max() < 5 * 0.46
    # Which item follows another: by 1 in 1 of 64 of all pairs; 100,800 pairs, a standard deviation of 39
    follows = (np.diff(orders, axis=1) == 1).sum()
    assert abs(follows - orders[:, 1:].size / count) < 5 * 39


def test_the_order_never_changes() -> None:
    """A run goes on with the order that it began with: also in later versions."""
    assert shuffled(np.arange(10), 10, 0, 0).tolist() == [4, 0, 6, 7, 5, 3, 8, 1, 2, 9]
    assert shuffled(np.array([0, 10**9]), 10**10, 7, 3).tolist() == [8304548060, 9645069444]
