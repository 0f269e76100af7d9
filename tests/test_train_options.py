"""Options as they are given: on the command line, in a YAML file, and both."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("typer")

from spu.cli.app import _switches
from spu.settings import Recompute
from spu.train.config import RunOptions, TrainConfig, for_tokens_per_step
from spu.train.options import read_options, write_yaml


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
        ("seq: 8\nrecompte: on", r"--config .*job.yaml, line 2: 'recompte' is not an option; did you mean recompute\?"),
        ("micro-batches: 3", r"'micro-batches' is not an option; did you mean microbatches\?"),
        ("config: other.yaml", "'config' is not an option"),
        ("precision: fp8", r"job.yaml, line 1: unknown precision 'fp8': give one of fp16, bf16, fp32"),
        ("seq: 1.5", r"job.yaml, line 1: seq 1.5 must be a whole number of at least 1"),
        ("seq: true", r"job.yaml, line 1: seq True must be a whole number"),
        ("data: [a, 3]", r"job.yaml, line 1: data \['a', 3\] must be a text or a list of texts"),
        ("data: []", r"job.yaml, line 1: data \[\] must be a text or a list of texts"),
        ("seq: 1\nbatch: 8\nseq: 2", "job.yaml, line 3: seq stands in line 1 already: give it once"),
        ("save-every: 1\nsave_every: 2", "job.yaml, line 2: save_every stands in line 1 already"),
        ("lr: 1" + 400 * "0", "job.yaml, line 1: lr 10+ must be a positive number"),
        ("- seq", "must be lines of OPTION: VALUE, and is a sequence"),
        ("# a job\nname: 2024-01-01", r"line 2: name datetime.date.2024, 1, 1. must be a text"),
        ("train:\n  seq: 8", r"line 1: 'train' is not an option"),
        ("lr:\n  peak: 1", "line 1: lr has keys or lists in it: an option has one value, or a plain list"),
        ("budget:\n  cpu: 8GB\n  cuda:0: 4GB", "line 1: budget has keys or lists .*: write cpu=8GB,cuda:0=4GB$"),
        ("budget: {cpu: [8]}", "line 1: budget has keys or lists .* plain list$"),
        ("devices: 2", "line 1: devices 2 must be a text; name them, as in cpu:0,cpu:1, or write auto"),
        ("devices: [cpu:0, cpu:1]", "must be a text: write cpu:0,cpu:1"),
        ("budget: 0", "budget 0 must be a text; write DEVICE=SIZE, as in cuda:0=8GB"),
        ("data: [[a], b]", "line 1: data has keys or lists in it"),
        ("lr: .nan", "line 1: lr nan must be a positive number"),
        ("seq: 8\n\tlr: 1", "is not YAML"),
        ("x: &x [1, 1]\n<<: {seq: 8}", "line 1: 'x' is not an option"),
        ("seq: 1\n---\nseq: 2", "is not YAML: expected a single document"),
        (3000 * "[", "is not YAML: too deep"),
        ("seq: !!python/object:os.system 1", "is not YAML: could not determine a constructor"),
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


def test_what_is_written_reads_back_as_the_same_settings(tmp_path):
    for config in (
        TrainConfig(),
        TrainConfig(model="on", data="a: b#c", lr=1e-7, recompute=[0, 2], steps=3, microbatches="auto", replan=True),
        TrainConfig(recompute=False, retry=False, budget="cpu=1GB,disk=/a b:1GB", max_loss=3.0, warmup=0.0),
    ):
        write_yaml(tmp_path / "config.yaml", config, "a title")
        assert (
            TrainConfig(**read_options({"config": str(tmp_path / "config.yaml")}, TrainConfig, RunOptions)[0]) == config
        )


def test_a_step_of_more_tokens_has_more_microbatches_of_the_same_size():
    config = TrainConfig(batch=8, microbatches=4, seq=16)
    assert for_tokens_per_step(config, 128) == {"batch": 8, "accumulate": 1}
    assert for_tokens_per_step(config, 129) == {"batch": 16, "accumulate": 2}
    more = dataclasses.replace(config, batch=16, accumulate=2)
    assert for_tokens_per_step(more, 500) == {"batch": 32, "accumulate": 4}
    with pytest.raises(ValueError, match="--batch 9 is no multiple of --accumulate 2"):
        for_tokens_per_step(dataclasses.replace(config, batch=9, accumulate=2), 500)


@pytest.mark.parametrize(
    "where",
    [{"budget": "cpu=1GB,disk=spill:1GB"}, {"budget": "cuda:0=8GB,cpu=32GB"}, {"residency": "streamed"}],
)
def test_a_step_of_more_tokens_may_be_streamed(where):
    """It had several runs of the schedule, which a streamed model refuses: the guide's own run on 8 GB could not."""
    config = TrainConfig(batch=8, microbatches=4, seq=16, **where)
    step = for_tokens_per_step(config, 300)
    assert step == {"batch": 24, "accumulate": 1, "microbatches": 12}
    assert for_tokens_per_step(dataclasses.replace(config, **step), 300) == step, "a run goes on as it began"
    own = dataclasses.replace(config, batch=16, accumulate=2)
    assert for_tokens_per_step(own, 500) == {"batch": 32, "accumulate": 4}, "the user's own choice"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["train", "--sample", "off", "--name", "off"], ["train", "--no-sample", "--name", "off"]),
        (["train", "--keep-best", "on", "--replan", "No"], ["train", "--keep-best", "--no-replan"]),
        (["train", "--no-sample", "--compare"], ["train", "--no-sample", "--compare"]),
    ],
)
def test_a_switch_may_have_a_word(words, meant):
    assert _switches(words) == meant
