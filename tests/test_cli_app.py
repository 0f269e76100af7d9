"""How a command of `spu` ends: its exit code and its one message."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

typer = pytest.importorskip("typer")

from chat_models import chat_tokenizer, tiny_llama  # noqa: E402
from small_runs import run  # noqa: E402

from spu import __main__  # noqa: E402
from spu.checkpoint import CheckpointError  # noqa: E402
from spu.cli.app import guarded  # noqa: E402
from spu.cli.panels import PANELS, panel_of  # noqa: E402
from spu.cli.words import as_options  # noqa: E402
from spu.engine.engine import StageError  # noqa: E402
from spu.train.config import PlanOptions, RunOptions, TrainConfig  # noqa: E402


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


@pytest.mark.parametrize(("code", "exit_code"), [(28, 1), (5, 1), (20, 2)])  # no space, an I/O error; not a folder
def test_a_checkpoint_that_the_disk_does_not_take_is_no_bad_input(code: int, exit_code: int) -> None:
    """A scheduler that starts a run again after 1 gave it up: the code was 2, of bad input."""

    def command() -> None:
        raise CheckpointError("checkpoint runs/one/checkpoint: writing failed") from OSError(code, os.strerror(code))

    with pytest.raises(typer.Exit) as exit_info:
        guarded(command)
    assert exit_info.value.exit_code == exit_code


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


def test_every_option_has_one_group_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """They were one list of seventy, in the order of the code."""
    names = {field.name for options in (TrainConfig, RunOptions, PlanOptions) for field in options.own_first()}
    assert sorted(" ".join(PANELS.values()).split()) == sorted(names)
    assert panel_of("lr") == "Learning"
    assert run("train", "--help") == 0
    shown = capsys.readouterr().out
    places = [shown.find(f"─ {panel} ─") for panel in PANELS]
    assert places[0] > 0
    assert places == sorted(places)


def test_what_would_fit_is_said_in_options() -> None:
    """`spu plan` said grads="bf16", which no command takes."""
    for said, wanted in (
        ('grads="bf16"\n  state="exact"', "--grads bf16\n  --state exact"),
        ("recompute=True and microbatches=16 (of the same", "--recompute on and --microbatches 16 (of the same"),
        ("recompute=False size=3 state=x", "--recompute off size=3 state=x"),
    ):
        assert as_options(said) == wanted


def test_ctrl_c_while_the_command_is_imported_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It was a traceback."""

    def pressed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.__import__", pressed)
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "spu: interrupted\n"


def test_a_tokenizer_and_a_config_of_two_models_are_said_with_both_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`its tokenizer gives token 12, its vocabulary has 10` did not say whose vocabulary."""
    chat_tokenizer().save_pretrained(tmp_path / "model")
    tiny_llama(10).config.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat . " * 200)
    data = ("--data", tmp_path / "text.txt", "--out", tmp_path / "runs", "--name", "one")
    assert run("train", "--model", tmp_path / "model", *data, "--seq", 8, "--steps", 1) == 2
    assert "gives token 14, and vocab_size in its config.json is 10: give" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
