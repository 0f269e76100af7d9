"""The GPipe and the forward-only schedule, as literal triangles; test_schedules_catalog.py has their properties."""

from __future__ import annotations

from spu.schedules import forward_only, gpipe, parse_grid


def test_gpipe_is_all_forwards_then_all_backwards_in_ascending_order():
    assert gpipe(3, 2) == parse_grid("""
        0F0 0F1 0B0 0B1
        1F0 1F1 1B0 1B1
        2F0 2F1 2B0 2B1
    """)


def test_gpipe_of_one_stage():
    assert gpipe(1, 3) == parse_grid("0F0 0F1 0F2 0B0 0B1 0B2")


def test_forward_only_is_the_forwards():
    assert forward_only(2, 3) == parse_grid("0F0 0F1 0F2\n1F0 1F1 1F2")
