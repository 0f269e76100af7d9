"""How a command of `spu` ends: its exit code and its one message."""

from __future__ import annotations

import pytest

typer = pytest.importorskip("typer")

from spu.cli.app import guarded  # noqa: E402
from spu.engine.engine import StageError  # noqa: E402


def test_what_a_stage_refuses_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        cause = ValueError("--colour red is not known: give blue")
        raise StageError(0, "cpu:0", None, cause) from cause

    with pytest.raises(typer.Exit) as exit_info:
        guarded(command)
    assert exit_info.value.exit_code == 2
    assert capsys.readouterr().err == "spu: error: --colour red is not known: give blue\n"
