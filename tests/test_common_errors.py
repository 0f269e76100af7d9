"""What an error's message is cut to."""

from __future__ import annotations

import pytest

from spu.common.errors import first_line, kind_and_line


@pytest.mark.parametrize(
    ("error", "text", "with_kind"),
    [
        (ValueError("one\ntwo"), "one", "ValueError: one"),
        (
            ValueError("of a size:\n    expected int\nthree"),
            "of a size: expected int",
            "ValueError: of a size: expected int",
        ),
        (ValueError("of nothing:"), "of nothing:", "ValueError: of nothing:"),
        (ValueError(""), "ValueError", "ValueError"),
        (ValueError(" \n"), "ValueError", "ValueError"),
        (KeyError("nope"), "KeyError: 'nope'", "KeyError: 'nope'"),
    ],
)
def test_the_line_that_says_what_is_wrong(error: Exception, text: str, with_kind: str) -> None:
    assert first_line(error) == text
    assert kind_and_line(error) == with_kind
