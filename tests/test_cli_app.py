"""How a command of `spu` ends: its exit code and its one message."""

from __future__ import annotations

import pytest

typer = pytest.importorskip("typer")

from small_runs import run  # noqa: E402

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


def test_a_lost_process_is_said_without_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    """It said `error: : rank 1 ...: check the path and the room on it`, or printed a hundred lines of traceback."""
    lost = ConnectionError("rank 1 exchanged gradients with rank 0, which has ended")
    stage = StageError(0, "rank0", None, lost)
    stage.__cause__ = lost
    for error in (lost, stage, TimeoutError("rank 0 has waited 60 s for ranks [1]: their output says why")):

        def command(error: Exception = error) -> None:
            raise error

        with pytest.raises(typer.Exit) as exit_info:
            guarded(command)
        assert exit_info.value.exit_code == 1
        assert capsys.readouterr().err == f"spu: error: {error}\n"


def test_a_full_disk_is_said_with_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise OSError(28, "No space left on device", "runs/one")

    with pytest.raises(typer.Exit):
        guarded(command)
    assert "runs/one: No space left on device: check the path and the room on it" in capsys.readouterr().err


def test_a_full_disk_without_a_path_is_said_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(typer.Exit):
        guarded(command)
    assert capsys.readouterr().err.startswith("spu: error: No space left on device: check")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("merge", "nobody", "--out", "new"), "spu merge nobody: no such run"),
        (("merge", "nobody", "--out", ""), "--out '' names no folder: give a new one"),
        (("chat", "nobody", "--seed", "9" * 20), "9223372036854775807"),
    ],
)
def test_bad_input_is_named(arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
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
    assert run(*arguments) == 2
    assert capsys.readouterr().err.strip().endswith(says)
