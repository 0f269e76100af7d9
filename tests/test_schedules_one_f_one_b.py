"""The 1F1B schedule, as literal triangles; test_schedules_catalog.py has its properties."""

from __future__ import annotations

from spu.schedules import one_f_one_b, parse_grid


def test_three_stages_four_microbatches():
    assert one_f_one_b(3, 4) == parse_grid("""
        0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3
        1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3
        2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3
    """)


def test_fewer_microbatches_than_stages():
    assert one_f_one_b(4, 2) == parse_grid("""
        0F0 0F1 0B0 0B1
        1F0 1F1 1B0 1B1
        2F0 2F1 2B0 2B1
        3F0 3B0 3F1 3B1
    """)


def test_one_stage_alternates():
    assert one_f_one_b(1, 3) == parse_grid("0F0 0B0 0F1 0B1 0F2 0B2")
