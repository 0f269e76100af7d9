"""The split-backward schedules, as literal triangles."""

from __future__ import annotations

from spu.schedules import parse_grid, peak_on_ranks, zb, zbv


def test_zb_of_three_ranks_and_four_microbatches():
    assert zb(3, 4) == parse_grid("""
        0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3
        1F0 1F1 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3
        2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3
    """)


def test_zb_of_fewer_microbatches_than_ranks():
    assert zb(3, 1) == parse_grid("0F0 0I0 0W0\n1F0 1I0 1W0\n2F0 2I0 2W0")


def test_zbv_of_two_ranks_and_four_microbatches():
    assert zbv(2, 4) == parse_grid("""
        0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 3F2 3I2 3W2 0I1 0W1 3F3 3I3 3W3 0I2 0W2 0I3 0W3
        1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1F3 1I1 1W1 2F3 2I2 2W2 1I2 2I3 1I3 1W2 2W3 1W3
    """)


def test_a_rank_holds_as_much_as_1f1bs_first_one():
    assert peak_on_ranks(zb(4, 9)) == [4, 4, 4, 4]
    assert peak_on_ranks(zbv(4, 9)) == [8, 8, 8, 8]  # of stages with half the layers


def test_one_rank_alternates():
    assert zb(1, 2) == parse_grid("0F0 0I0 0W0 0F1 0I1 0W1")
    assert zbv(1, 1) == parse_grid("0F0 1F0 1I0 1W0 0I0 0W0")
