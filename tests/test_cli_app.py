"""How a command of `spu` ends: its exit code and its one message."""

from __future__ import annotations

import pytest

typer = pytest.importorskip("typer")

from spu.cli.app import guarded, main  # noqa: E402
from spu.engine.engine import StageError  # noqa: E402


def test_what_a_stage_refuses_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        cause = ValueError("--colour red is not known: give blue")
        raise StageError(0, "cpu:0", None, cause) from cause

    with pytest.raises(typer.Exit) as exit_info:
        guarded(command)
    assert exit_info.value.exit_code == 2
    assert capsys.readouterr().err == "spu: error: --colour red is not known: give blue\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("merge", "nobody", "--out", "new"), "spu merge nobody: no such run"),
        (("merge", "nobody", "--out", ""), "--out '' names no folder: give a new one"),
        (("chat", "nobody", "--seed", "9" * 20), "9223372036854775807"),
    ],
)
def test_bad_input_is_named(arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(list(arguments))
    assert exit_info.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["merge"], "Missing argument 'run'; see spu merge --help"),
        (["plan", "internlm2-1.8b"], "(internlm2-1.8b); see spu plan --help"),
        (["trian"], "Did you mean 'train'?; see spu --help"),
    ],
)
def test_a_wrong_argument_names_the_help_of_its_command(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert capsys.readouterr().err.strip().endswith(says)
