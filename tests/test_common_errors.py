"""What an error's message is cut to."""

from __future__ import annotations

import pytest

from spu.common.errors import first_line


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("of field 'size':\n    expected int\nthree"), "of field 'size': expected int"),
        (ValueError("of nothing:"), "of nothing:"),
        (ValueError(""), "ValueError"),
        (ValueError(" \n"), "ValueError"),
        (KeyError("nope"), "KeyError: 'nope'"),
    ],
)
def test_the_line_that_says_what_is_wrong(error: Exception, text: str) -> None:
    assert first_line(error) == text
