"""`spu tune`: what it would measure, and bad input, which measures and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("typer")

from small_runs import run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--device", "cpu:0"), ("--device cpu:0", "or cpu")),
        (("--device", "npu"), ("--device npu", "cuda:0")),
        (("--device", "cpu", "--minutes", "-1"), ("--minutes -1.0", "positive")),
        (("--device", "cpu", "--minutes", "nan"), ("--minutes nan", "positive")),
        (("--device", "cpu", "--out", "."), ("--out '.'", "is no file")),
        (("--device", "cpu", "--ops", "linear,", "--dry"), ("--ops linear,", "linear_dx")),
        (("--device", "cuda:0", "--ops", "softmax", "--dry"), ("--ops softmax", "linear_dw")),
        (("--device", "cpu", "--dtypes", "fp64", "--dry"), ("--dtypes fp64", "bf16")),
    ],
    ids=" ".join,
)
def test_bad_input_is_named_and_measures_nothing(
    arguments: tuple[str, ...],
    expected: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPU_CACHE", str(tmp_path))
    assert run("tune", *arguments) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in expected), error
    assert not list(tmp_path.iterdir())


def test_a_dry_run_lists_what_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("spu._C")
    assert run("tune", "--device", "cuda:0", "--ops", "linear", "--dtypes", "bf16", "--dry") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith("linear/bf16/") for line in lines)
