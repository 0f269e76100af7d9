"""Bytes and seconds as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spu.common.units import columns, format_bytes, format_bytes_up, format_seconds
from spu.devices.manager import parse_bytes


@pytest.mark.parametrize(
    ("count", "nearest", "up"),
    [
        (0, "0 B", "0 B"),
        (999, "999 B", "999 B"),
        (1000, "1.00 kB", "1.00 kB"),
        (1_234_567, "1.23 MB", "1.24 MB"),
        (99_990_000, "100 MB", "100 MB"),
        (999_999_999, "1.00 GB", "1.00 GB"),
        (335_200_000_000, "335 GB", "336 GB"),
        (999_999, "1.00 MB", "1.00 MB"),
        (-1500, "-1.50 kB", "-1.50 kB"),
    ],
)
def test_bytes_with_three_digits(count, nearest, up):
    assert (format_bytes(count), format_bytes_up(count)) == (nearest, up)


@given(st.integers(0, 10**17))
def test_what_format_bytes_writes_parse_bytes_reads(n):
    read = parse_bytes(format_bytes(n))
    assert abs(read - n) <= max(0.5, 0.006 * n), f"{n} -> {format_bytes(n)} -> {read}"


@given(st.integers(0, 10**16))
def test_rounded_up_is_never_less_and_close(count):
    back = parse_bytes(format_bytes_up(count))
    assert count <= back <= count * 1.01 + 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 us"), (2.5e-4, "250 us"), (0.0123, "12.3 ms"), (0.9999, "1 s"), (1.5, "1.5 s"), (1234.0, "1234 s")],
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [("a", "1", "22"), ("long", "333", "4")]
    assert columns(rows) == ["a     1    22", "long  333  4"]
    assert columns(rows, left=1) == ["a       1  22", "long  333   4"]
