"""Cases out of a grid, in which every two (or three) values meet, in place of the whole product.

A fault that one value brings, or two together, shows in some case; covering arrays find nearly all faults that the
product finds (Kuhn, Wallace, Gallo: Software fault interactions and implications for software testing, 2004).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

__all__ = ["covering"]


def covering(*columns: Sequence[Any], strength: int = 2) -> list[tuple[Any, ...]]:
    """Return rows with one value of each column, such that any ``strength`` columns have all their combinations.

    Greedy: each row is the first one of the product that brings the most new combinations. The same on every run.
    """
    rows = list(itertools.product(*(range(len(column)) for column in columns)))
    places = list(itertools.combinations(range(len(columns)), strength))
    missing = {(place, tuple(row[at] for at in place)) for row in rows for place in places}
    held = {row: [(place, tuple(row[at] for at in place)) for place in places] for row in rows}
    found = []
    while missing:
        best = max(rows, key=lambda row: sum(one in missing for one in held[row]))
        missing.difference_update(held[best])
        found.append(best)
    return [tuple(column[at] for column, at in zip(columns, row)) for row in sorted(found)]
