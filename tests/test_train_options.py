"""Options as they are given: on the command line, in a YAML file, and both."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("yaml")

from spu.settings import Recompute
from spu.train.config import RunOptions, TrainConfig
from spu.train.options import read_options


def read(tmp_path: Path, text: str, **given):
    file = tmp_path / "job.yaml"
    file.write_text(text)
    config, options = read_options({"config": str(file), **given}, TrainConfig, RunOptions)
    return TrainConfig(**config), RunOptions(**options)


def test_a_yaml_file_has_the_names_of_the_command_line_which_wins(tmp_path):
    text = "precision: bf16\nsave-every: 7\nlr: 2e-3\nrecompute: on\nschedule: auto\nname: a\nreplan: true\nsteps:\n"
    config, options = read(tmp_path, text, precision="fp32", steps="5", name=None)
    assert (config.precision, config.save_every, config.lr, config.steps) == ("fp32", 7, 2e-3, 5)
    assert (config.recompute, config.schedule, config.replan) == (Recompute("all"), "auto", True)
    assert (options.name, options.config) == ("a", str(tmp_path / "job.yaml"))
    assert read(tmp_path, "")[0] == TrainConfig()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("recompte: on", r"--config .*job.yaml: 'recompte' is not an option; did you mean recompute\?"),
        ("micro-batches: 3", r"'micro-batches' is not an option; did you mean microbatches\?"),
        ("config: other.yaml", "'config' is not an option"),
        ("precision: fp8", r"unknown .*job.yaml: precision 'fp8': give one of fp16, bf16, fp32"),
        ("seq: 1.5", r"job.yaml: seq 1.5 must be a whole number of at least 1"),
        ("seq: true", r"job.yaml: seq True must be a whole number"),
        ("data: [a, b]", r"job.yaml: data is given 2 times, and a run has one text: cat a b > all.txt"),
        ("seq: 1\nbatch: 8\nseq: 2", "job.yaml has seq twice: give one"),
        ("save-every: 1\nsave_every: 2", "job.yaml has save_every twice: give one"),
        ("lr: 1" + 400 * "0", "job.yaml: lr 10+ must be a positive number"),
        ("- seq", "must be lines of OPTION: VALUE"),
        ("seq: [", "is not YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason):
        read(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"--config .*none.yaml: No such file or directory: give a YAML file"):
        read_options({"config": str(tmp_path / "none.yaml")}, TrainConfig)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"microbatches": "few"}, "--microbatches 'few' must be a whole number of at least 1, or auto"),
        ({"seq": "+-5"}, "--seq '.-5' must be a whole number of at least 1"),
        ({"lr": "fast"}, "--lr 'fast' must be a positive number"),
        ({"recompute": "yes"}, "unknown --recompute 'yes': give one of auto, on"),
    ],
)
def test_texts_of_the_command_line_are_read_and_checked(given, reason):
    assert read_options({"microbatches": "12", "recompute": "0,2", "lr": "1"}, TrainConfig) == [
        {"microbatches": 12, "recompute": Recompute("given", frozenset((0, 2))), "lr": 1.0}
    ]
    with pytest.raises(ValueError, match=reason):
        read_options(given, TrainConfig)
