"""Metrics survive crashes; pictures and summaries say what the numbers say."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("matplotlib")

from spu.train.metrics import MetricsFile, read_metrics, train_rows, validation_rows
from spu.train.progress import PlainView, Progress, RunningMean
from spu.train.report import comparison_lines, difference_percent, draw_loss, summary_lines
from spu.train.run_folder import RunFolder, find_folder, new_folder


def write_rows(path, count: int) -> MetricsFile:
    metrics = MetricsFile(path)
    for step in range(1, count + 1):
        metrics.append(step=step, tokens=step * 10, loss=5 / step, grad_norm=math.inf, skipped=step == 2)
        if step % 2 == 0:
            metrics.append(step=step, val_loss=4 / step)
    return metrics


def test_metrics_round_trip_bit_for_bit(tmp_path):
    write_rows(tmp_path / "m.jsonl", 5)
    rows = read_metrics(tmp_path / "m.jsonl")
    assert [row["loss"] for row in train_rows(rows)] == [5 / step for step in range(1, 6)]
    assert [row["val_loss"] for row in validation_rows(rows)] == [2.0, 1.0]
    assert train_rows(rows)[0]["grad_norm"] is None, "JSON has no infinity"


def test_a_torn_last_line_and_steps_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "m.jsonl"
    metrics = write_rows(path, 5)
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    assert len(train_rows(read_metrics(path))) == 5
    metrics.keep_up_to(3)
    metrics.append(step=4, loss=1.0)
    assert [row["step"] for row in train_rows(read_metrics(path))] == [1, 2, 3, 4]
    assert read_metrics(tmp_path / "missing") == []


def test_running_mean_has_no_bias_and_skips_nonfinite():
    mean = RunningMean()
    assert mean.add(4.0) == pytest.approx(4.0)
    assert mean.add(math.nan) == pytest.approx(4.0)
    assert [mean.add(2.0) for _ in range(200)][-1] == pytest.approx(2.0, abs=1e-3)


def test_loss_picture_is_drawn_with_and_without_a_reference(tmp_path):
    write_rows(tmp_path / "m.jsonl", 30)
    rows = read_metrics(tmp_path / "m.jsonl")
    for name, reference in (("a.png", None), ("b.png", rows)):
        draw_loss(tmp_path / name, "title", rows, final_val=0.2, reference=reference)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 10_000


def test_difference_is_relative_and_signed():
    assert difference_percent(1.02, 1.0) == pytest.approx(2.0)
    assert difference_percent(0.5, 1.0) == pytest.approx(-50.0)
    lines = comparison_lines({"val_loss": 1.38, "tokens_per_s": 3000.0}, {"val_loss": 1.37, "tokens_per_s": 1500.0})
    assert "+0.73%" in lines[2]
    assert "2.00x" in lines[2]


def test_summary_says_what_was_measured(tmp_path):
    summary = {
        "parameters": 3_082_496, "tokens": 786_432, "corpus": "text", "seconds": 300.0, "tokens_per_s": 2621.4,
        "val_loss": 1.3652, "unit": "byte", "skipped": 3, "loss_scale": 65536.0, "idle_share": 0.151,
        "predicted_idle_share": 0.125, "prompt": "the ", "sample": "cat",
    }  # fmt: skip
    text = "\n".join(summary_lines(summary, tmp_path))
    for expected in (
        "3.08M",
        "786,432",
        "2,621 tokens/s",
        "1.3652 nats a byte",
        "3 skipped",
        "65536",
        "15.1%",
        "12.5%",
    ):
        assert expected in text
    assert "the |cat" in text


def test_plain_view_prints_about_twenty_lines(capsys):
    import sys

    view = PlainView("train x", 200, 0, sys.stdout)
    for step in range(1, 201):
        view.update(Progress(step, 2.5, 1234.5, 65536.0, 1, 2.4))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    assert lines[-1].startswith("train x 200/200 loss 2.500 val 2.400 scale 65536 skipped 1 1,234 tokens/s left")


def rich_text(title, total, width, progress, note=""):
    import io

    from rich.console import Console

    from spu.train.progress import RichView

    text = io.StringIO()
    view = RichView(title, total, 0, Console(file=text, force_terminal=True, width=width))
    view.update(progress)
    view.say(note)
    view.stop()
    return text.getvalue()


def test_rich_view_shows_the_numbers():
    text = rich_text("train x", 10, 140, Progress(5, 2.5, 1234.5, 65536.0, 1), "a note [with brackets]")
    for expected in ("train x", "5/10", "loss 2.500 scale 65536 skipped 1 1,234 tokens/s", "a note [with brackets]"):
        assert expected in text


def test_rich_view_fits_90_columns():
    """Everything in it was cut to an ellipsis."""
    text = rich_text("train wikitext-2", 400, 90, Progress(5, 2.5, 12345.5, 65536.0, 0, 2.75))
    for expected in ("train wikitext-2", "5/400", "loss 2.500 val 2.750 12,346 tokens/s", "left"):
        assert expected in text
    assert "\u2026" not in text


def test_folders_are_never_reused(tmp_path):
    from spu.train.config import TrainConfig

    folder = new_folder(str(tmp_path), "a")
    assert not folder.path.exists(), "nothing is made before the run is known to work"
    folder.create(TrainConfig(), {"name": "n", "sha256": "s"})
    assert folder.read_config() == (TrainConfig(), {"name": "n", "sha256": "s"})
    with pytest.raises(ValueError, match=r"--name a: .* exists: give another name, or --resume a"):
        new_folder(str(tmp_path), "a")
    with pytest.raises(ValueError, match="exists"):
        RunFolder(tmp_path / "a").create(TrainConfig(), {})
    with pytest.raises(ValueError, match="being trained by another process"):
        RunFolder(tmp_path / "a").lock()
    folder.unlock()
    RunFolder(tmp_path / "a").lock()
    with pytest.raises(ValueError, match="not a plain name"):
        new_folder(str(tmp_path), "../a")
    first = new_folder(str(tmp_path), None)
    first.path.mkdir()
    assert new_folder(str(tmp_path), None).path != first.path


def test_a_folder_of_a_run_that_was_killed_before_its_settings_were_written_is_used(tmp_path):
    """It was refused, and could not be resumed either, since the name of the half-written file had changed."""
    from spu.train.config import TrainConfig

    (tmp_path / "a").mkdir()
    for name in (".lock", ".config.json.12-34.new"):
        (tmp_path / "a" / name).touch()
    new_folder(str(tmp_path), "a").create(TrainConfig(), {})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes").touch()
    with pytest.raises(ValueError, match="exists"):
        new_folder(str(tmp_path), "b")


def test_runs_are_found_by_name_path_and_age(tmp_path):
    with pytest.raises(ValueError, match="there is no run in"):
        find_folder(str(tmp_path), "latest")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert find_folder(str(tmp_path), "a").name == "a"
    assert find_folder("elsewhere", str(tmp_path / "b")).name == "b"
    with pytest.raises(ValueError, match=r"--resume c: no such run; runs in .*: .*[ab]"):
        find_folder(str(tmp_path), "c")
    with pytest.raises(ValueError, match=r"config.json cannot be used"):
        RunFolder(tmp_path / "a").read_config()
