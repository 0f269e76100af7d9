"""Schedules with several stages on each rank, as literal triangles."""

from __future__ import annotations

from spu.schedules import forward_only, interleaved, layer_outer, one_f_one_b, parse_grid, peak_on_ranks


def test_interleaved_of_two_ranks_two_stages_each_and_four_microbatches():
    assert interleaved(2, 4) == parse_grid("""
        0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3
        1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3
    """)


def test_a_group_that_is_not_full_is_a_full_one_with_gaps():
    assert interleaved(2, 1) == parse_grid("0F0 2F0 2B0 0B0\n1F0 3F0 3B0 1B0")
    assert interleaved(2, 3)[1] == [a for a in interleaved(2, 4)[1] if a.microbatch < 3]


def test_interleaved_with_one_stage_each_is_1f1b():
    assert interleaved(3, 5, virtual=1) == one_f_one_b(3, 5)


def test_interleaved_holds_what_is_stated():
    assert peak_on_ranks(interleaved(4, 16)) == [11, 9, 7, 5]


def test_layer_outer_finishes_a_stage_before_its_next():
    assert layer_outer(2, 2, virtual=2) == parse_grid("""
        0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1
        1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1
    """)
    assert layer_outer(1, 3, virtual=2) == parse_grid("0F0 0F1 0F2 1F0 1B0 1F1 1B1 1F2 1B2 0B0 0B1 0B2")


def test_evaluation_takes_groups_of_microbatches_through_a_ranks_stages():
    assert forward_only(2, 3, stage_ranks=[0, 1, 1, 0]) == parse_grid("""
        0F0 0F1 3F0 3F1 0F2 3F2
        1F0 1F1 2F0 2F1 1F2 2F2
    """)
