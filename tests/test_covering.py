"""The cases of a grid: all values meet that are to meet, in far fewer cases than the product."""

from __future__ import annotations

import itertools

import pytest
from covering import covering


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_every_combination_occurs(strength: int) -> None:
    columns = [("a", "b"), (1, 2, 3, 4), (False, True), (None, 0.5), (1, 2, 8)]
    rows = covering(*columns, strength=strength)
    for some in itertools.combinations(range(len(columns)), strength):
        met = {tuple(row[at] for at in some) for row in rows}
        assert met == set(itertools.product(*(columns[at] for at in some)))
    assert len(rows) == len(set(rows)) <= (4, 16, 32)[strength - 1]
    assert rows == covering(*columns, strength=strength)
