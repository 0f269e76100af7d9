"""`spu plan` as users run it: for devices that are not here, from configs and files; and training by what it wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from small_runs import run
from tiny_models import BYTES

from spu.cli.plan import _train_command, declared_devices, plan_command
from spu.plan import Plan
from spu.train.config import PlanOptions

TINY = {**BYTES, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "tie_word_embeddings": False}


@pytest.fixture
def tiny(tmp_path):
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(TINY))
    return file


def test_a_config_that_does_not_fit_is_refused_in_words(tmp_path, capfd):
    options = ("--budget", "cuda:0=8GB,cpu=64GB", "--speed", "cpu=desktop-cpu", "--seq", "1024", "--batch", "4")
    assert run("plan", "--model", "internlm2-7b", *options, "--out", str(tmp_path / "plan.json")) == 2
    text = capfd.readouterr().err
    assert "internlm2-7b does not fit." in text
    assert "training needs 139 GB whatever the batch" in text
    assert "short by" in text
    assert "what would fit:" in text
    assert not (tmp_path / "plan.json").exists()


def test_a_plan_is_written_and_trained_by(tiny, tmp_path, capfd):
    plan = tmp_path / "plan.json"
    options = ("--devices", "cpu:0,cpu:1", "--speed", "cpu=1GFLOPS", "--same-order", "--schedule", "1f1b")
    made = run("plan", "--model", str(tiny), *options, "--batch", "4", "--seq", "16", "--out", str(plan))
    assert made == 0, capfd.readouterr().err
    out = capfd.readouterr().out
    assert f"train with it: spu train --model {tiny} --data FILE --plan {plan}\n" in out
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    train = (
        "train",
        "--model",
        str(tiny),
        "--data",
        str(tmp_path / "text.txt"),
        "--out",
        str(tmp_path),
        "--steps",
        "3",
    )
    assert run(*train, "--plan", str(plan), "--name", "a", "--evals", "1") == 0, capfd.readouterr().err
    out = capfd.readouterr().out
    assert any(line.split() == ["predicted", "measured"] for line in out.splitlines())
    asked, trained = Plan.load(plan), Plan.load(tmp_path / "a" / "plan.json")
    assert [s.layers for s in trained.stages] == [s.layers for s in asked.stages]
    assert trained.predicted.basis == "measured"
    assert run(*train, "--plan", str(plan), "--name", "b", "--schedule", "gpipe") == 2
    assert "was made for 1f1b: leave the option out, or plan again" in capfd.readouterr().err


def test_the_command_for_a_plan_names_weights_and_adapters() -> None:
    """It trained 1.8 billion random parameters on the default text, where adapters were planned."""
    options = PlanOptions(lora=16, lora_targets="q_proj", budget="cpu=32GB", out="p.json")
    said = "spu train --model FOLDER --data FILE --plan p.json --lora 16 --lora-targets q_proj --budget cpu=32GB"
    assert _train_command(options) == said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--model", "gpt-17"), "no such file or folder with a config.json"),
        (("--devices", "cuda:7,cpu"), "cuda:7 is not on this machine: say how much memory it has, --budget cuda:7=8GB"),
        (("--budget", "cuda:7=lots"), "budget cuda:7=lots: 'lots' is not a size"),
        (("--budget", "cuda:7"), "is not DEVICE=SIZE"),
        (("--budget", "cpu=1GB,disk=/data"), "disk=/data has no size: write disk=FOLDER:SIZE"),
        (("--residency", "streamed"), "residency streamed would move nothing: there is no tier below cpu:0"),
        (("--model", "NONE"), "LlamaForCausalLM has no layers: its config's num_hidden_layers is 0, give 1 or more"),
        (("--model", "TEXT"), "Validation error for field 'hidden_size': TypeError: Field 'hidden_size' expected int"),
        (("--out", "."), "--out . is a folder: give a file"),
        (("--out", "no/such/plan.json"), "--out no/such/plan.json: there is no folder no/such: make it"),
        (("--picture", "no/such/plan.png"), "--picture no/such/plan.png: there is no folder no/such: make it"),
        (("--picture", "plan.doc"), "--picture plan.doc: give a name that ends in .png, .svg, .pdf"),
        (("--frozen", "--lora", "4"), "--frozen and --lora 4: adapters freeze the model themselves: give one of them"),
        (("--speed", "cuda:3=rtx3070"), "--speed names cuda:3; the devices are cpu:0"),
        (
            ("--model", "internlm2-1.8b", "--microbatches", "few"),
            "--microbatches 'few' must be a whole number of at least 1, or auto",
        ),
    ],
)
def test_bad_input_is_named(arguments, reason, tmp_path, capfd):
    for name, wrong in (("NONE", {"num_hidden_layers": 0}), ("TEXT", {"hidden_size": "16"})):
        (tmp_path / name).write_text(json.dumps({"model_type": "llama", **wrong}))
    arguments = tuple(str(tmp_path / part) if part in ("NONE", "TEXT") else part for part in arguments)
    speed = () if "--speed" in arguments else ("--speed", "cpu=1GFLOPS")
    assert run("plan", "--budget", "cpu=8GB", "--out", str(tmp_path / "p.json"), *arguments, *speed) == 2
    assert reason in capfd.readouterr().err


def test_a_file_that_could_not_be_written_is_refused_before_anything_is_measured(tmp_path, capfd, monkeypatch):
    """On a read-only file system the plan was made, and then named a file that nobody knew."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr("spu.cli.plan.describe_machine", None)
    assert run("plan", "--budget", "cpu=8GB", "--out", str(tmp_path / "p.json")) == 2
    assert "p.json cannot be written: give a file in a folder that can be" in capfd.readouterr().err


def test_devices_that_are_not_here_are_declared_by_their_budget():
    found, absent = declared_devices(None, "cuda:7=8GB,cpu=900TB")
    assert [(d.name, d.budget_bytes) for d in found] == [("cuda:7", 8 * 10**9), ("cpu:0", 900 * 10**12)]
    assert absent == {"cuda:7", "cpu:0"}
    here, absent = declared_devices("cpu:0,cpu:1", "cpu=1GB")
    assert [d.budget_bytes for d in here] == [5 * 10**8] * 2
    assert not absent


def test_sequences_that_the_model_has_no_positions_for_are_refused_as_in_train(tiny, tmp_path, capsys):
    assert run("plan", "--model", str(tiny), "--seq", "100000", "--out", str(tmp_path / "plan.json")) == 2
    assert "--seq 100000 is longer than the model's" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()


def test_absurd_numbers_end_in_one_line_or_a_refusal_that_counts(tiny, capsys):
    assert run("plan", "--model", str(tiny), "--budget", "cpu=64GB", "--seq", "100000000") == 2
    assert "--seq 100000000 must be a whole number from 1 to 1048576" in capsys.readouterr().err
    assert run("plan", "--model", str(tiny), "--budget", "cpu=64GB", "--seq", "64", "--batch", "1000000000") == 2
    assert "no plan fits the budgets" in "".join(capsys.readouterr())


@pytest.mark.parametrize("budget", ["cuda:0=8GB,cuda:0=9GB,cpu=24GB", "cuda=8GB,cuda:0=9GB", "cpu=1GB,CPU=2GB"])
def test_a_budget_that_names_a_device_twice_is_refused(budget: str) -> None:
    """The last one won without a word."""
    with pytest.raises(ValueError, match=r"names (cuda:0|cpu) twice, \dGB and \dGB: give one"):
        declared_devices(None, budget)


def test_a_budget_that_no_machine_has_is_refused() -> None:
    with pytest.raises(ValueError, match="cuda:0=99999999999999TB: .*more memory than any machine has"):
        plan_command(PlanOptions(budget="cuda:0=99999999999999TB"))


NOMINAL = ("--speed", "cuda:7=rtx3070,cpu=desktop-cpu", "--batch", "8", "--seq", "2048")  # 16k tokens a step


@pytest.mark.parametrize(
    ("model", "budget", "options", "peaks", "seconds"),
    [
        ("1.8b", "cpu=32GB", ("--state", "exact"), {"host": 19.1}, 15),
        ("7b", "cpu=76GB", ("--state", "compact"), {"host": 75.1}, 58),
        ("20b", "cpu=64GB", ("--frozen",), {"host": 49.6}, 110),
        ("20b", "cpu=32GB,disk=/no/such:100GB", ("--frozen",), {"host": 12.2, "disk": 39.7}, 110),
    ],
)
def test_models_larger_than_a_card_of_8_gb_are_streamed_through_it(
    model, budget, options, peaks, seconds, tmp_path, capfd
):
    """Peaks in GB: 1.89e9 x (2 + 4 + 4.125) bytes, 7.74e9 x (2 + 4 + 3.125), 19.9e9 x 2 of frozen weights; activations
    where they wait."""
    out = tmp_path / "plan.json"
    made = ("plan", "--model", f"internlm2-{model}", "--budget", f"cuda:7=8GB,{budget}", *NOMINAL, *options)
    assert run(*made, "--out", str(out)) == 0, capfd.readouterr().err
    text, plan = capfd.readouterr().out, Plan.load(out)
    s = plan.streaming
    assert s is not None
    assert plan.devices == ("cuda:7",)
    assert plan.predicted.peak_bytes[0] == s.tiers[0].peak_bytes <= 8e9
    assert {tier.name: tier.peak_bytes / 1e9 for tier in s.tiers[1:]} == pytest.approx(peaks, rel=0.1)
    assert all(tier.peak_bytes <= tier.budget_bytes for tier in s.tiers)
    assert plan.predicted.step_s == pytest.approx(seconds, rel=0.25)
    assert s.limit_s / plan.predicted.step_s > 0.8
    assert 0 < s.hidden_tokens < 16384
    for word in ("tier", "host", "busy in a step: compute", "bottleneck: compute", "is hidden from"):
        assert word in text
    assert all(len(line) < 180 for line in text.splitlines() if not line.startswith("written"))
    assert len(text.splitlines()) < 40


def test_a_streamed_plan_is_written_and_trained_by(tiny, tmp_path, capfd):
    plan, budget = tmp_path / "plan.json", f"cpu=1GB,disk={tmp_path / 'spill'}:1GB"
    how = ("--model", str(tiny), "--budget", budget)
    options = ("--residency", "streamed", "--speed", "cpu=1GFLOPS", "--batch", "2", "--seq", "16")
    assert run("plan", *how, *options, "--out", str(plan)) == 0, capfd.readouterr().err
    assert not (tmp_path / "spill").exists()
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    train = ("train", *how, "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path), "--steps", "2")
    assert run(*train, "--plan", str(plan), "--name", "a", "--evals", "1") == 0, capfd.readouterr().err
    rows = [line.split() for line in capfd.readouterr().out.splitlines() if " peak " in line]
    disk = next(row for row in rows if row[0] == "disk")
    assert disk[2:4] == disk[4:6]  # predicted and measured
    trained = Plan.load(tmp_path / "a" / "plan.json")
    assert trained.streaming is not None
    assert trained.streaming.tiers == Plan.load(plan).streaming.tiers
