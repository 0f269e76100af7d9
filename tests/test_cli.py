"""The `spu` command as users run it: a run from end to end, kills, Ctrl-C, resuming, and every kind of bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from small_runs import rows, summary
from small_runs import run as run_here
from tiny_models import BYTES

from spu.train.metrics import read_metrics, train_rows

TINY = {**BYTES, "num_hidden_layers": 3, "attention_dropout": 0.1}  # draws that must not depend on where a run was cut
STEPS = 16
SETTINGS = tuple(f"--steps {STEPS} --seq 16 --microbatches 2 --batch 2 --save-every 4 --evals 2".split())
DEVICES = ("--devices", "cpu:0,cpu:1")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a small model, a small text and one finished run, `whole`."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    code = run_here(*new_run(folder, "whole"))
    assert code == 0
    return folder


def new_run(folder: Path, name: str, *more: str) -> list[str]:
    model, out = str(folder / "tiny.json"), str(folder / "runs")
    data = [] if "--data" in more else ["--data", str(folder / "text.txt")]
    return ["train", "--model", model, *data, "--out", out, "--name", name, *SETTINGS, *DEVICES, *more]


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "spu", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def wait_for_steps(process: subprocess.Popen, metrics: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while len(train_rows(read_metrics(metrics))) < steps:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the run ended or hung before step {steps}: {process.communicate()[0]}")
        time.sleep(0.01)


def losses(folder: Path, name: str) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in train_rows(rows(folder, name))]


def val_losses(folder: Path, name: str) -> list[float]:
    return [row["val_loss"] for row in [*rows(folder, name), summary(folder, name)] if "val_loss" in row]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_leaves_everything_it_promises(place):
    run = place / "runs" / "whole"
    for name in ("config.json", "plan.json", "metrics.jsonl", "loss.png", "timeline.png", "trace.json", "summary.json"):
        assert (run / name).stat().st_size > 0, name
    assert (run / "checkpoint").is_dir()
    assert [step for step, _, _ in losses(place, "whole")] == list(range(1, STEPS + 1))
    first, last = losses(place, "whole")[0][1], losses(place, "whole")[-1][1]
    assert last < first < 6.5
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert 0 <= summary["idle_share"] < 1
    assert len(summary["sample"]) > 0
    assert "traceEvents" in json.loads((run / "trace.json").read_text())
    assert len(json.loads((run / "plan.json").read_text())["stages"]) == 2


def test_ctrl_c_and_then_kill_minus_nine_and_going_on_gives_the_same_bits(place):
    name, run = "stopped", place / "runs" / "stopped"
    process = start(*new_run(place, name))
    wait_for_steps(process, run / "metrics.jsonl", 2)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert json.loads((run / "summary.json").read_text())["finished"] is False
    done = len(losses(place, name))
    assert 2 <= done < STEPS
    assert f"stopped after step {done} of {STEPS}, saved; go on with --resume {run}" in output
    assert "Traceback" not in output

    process = start("train", "--resume", str(run))
    wait_for_steps(process, run / "metrics.jsonl", min(done + 3, STEPS))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (run / "summary.json").exists(), "the run was over before it could be killed"
    assert run_here("train", "--resume", name, "--out", str(place / "runs")) == 0
    assert losses(place, name) == losses(place, "whole")
    assert val_losses(place, name) == val_losses(place, "whole")


def test_the_planner_chooses_and_places_again(place, capsys):
    options = ("--schedule", "auto", "--microbatches", "auto", "--replan", "--steps", "3")
    arguments = new_run(place, "chosen", *options)
    at = arguments.index("--microbatches")
    del arguments[at : at + 2]
    assert run_here(*arguments) == 0
    output = capsys.readouterr().out
    assert "planned again: " in output
    rows = {line.split()[0] + " " + line.split()[1] for line in output.splitlines() if len(line.split()) > 2}
    assert {"cpu:0 peak", "cpu:1 peak", "idle share"} <= rows
    settings = json.loads((place / "runs" / "chosen" / "config.json").read_text())["settings"]
    assert (settings["schedule"], settings["microbatches"], settings["replan"]) == ("auto", "auto", True)
    plan = json.loads((place / "runs" / "chosen" / "plan.json").read_text())
    assert plan["predicted"]["basis"] == "measured"
    assert len(losses(place, "chosen")) == 3


def test_resuming_a_finished_run_only_reports(place, capsys):
    before = snapshot(place / "runs" / "whole")
    assert run_here("train", "--resume", "whole", "--out", str(place / "runs")) == 0
    assert "run whole is complete" in capsys.readouterr().out
    assert snapshot(place / "runs" / "whole") == before


def test_compare_trains_the_reference_once_and_prints_the_difference(place, capsys):
    arguments = [*new_run(place, "compared"), "--precision", "fp32", "--transfer", "none", "--steps", "6", "--compare"]
    assert run_here(*arguments) == 0
    output = capsys.readouterr().out
    assert "% in validation loss" in output
    run = place / "runs" / "compared"
    summary, reference = (json.loads((run / f"{name}.json").read_text()) for name in ("summary", "reference"))
    assert summary["val_loss"] == pytest.approx(reference["val_loss"], rel=5e-3)  # attention dropout draws differ
    ours = train_rows(read_metrics(run / "metrics.jsonl"))
    theirs = train_rows(read_metrics(run / "reference_metrics.jsonl"))
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=5e-3)
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in theirs]
    assert run_here("train", "--resume", str(run), "--compare") == 0
    assert "the reference of compared is there already" in capsys.readouterr().out


def test_fp32_pipeline_equals_plain_pytorch_on_the_same_batches(place):
    plain = json.dumps({**TINY, "attention_dropout": 0.0})
    (place / "plain.json").write_text(plain)
    arguments = new_run(
        place, "fp32", "--model", str(place / "plain.json"), "--precision", "fp32", "--transfer", "none"
    )
    assert run_here(*arguments, "--compare") == 0
    run = place / "runs" / "fp32"
    ours = train_rows(read_metrics(run / "metrics.jsonl"))
    theirs = train_rows(read_metrics(run / "reference_metrics.jsonl"))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), f"step {a['step']}"
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), f"step {a['step']}"


def test_the_saved_model_is_the_trained_one_with_tied_embeddings_too(place):
    from spu.data.corpus import make_corpus
    from spu.data.tokenizer import ByteTokenizer
    from spu.train.model import make_model
    from spu.train.plain import evaluate

    (place / "tied.json").write_text(json.dumps({**TINY, "tie_word_embeddings": True}))
    assert run_here(*new_run(place, "tied", "--model", str(place / "tied.json"), "--steps", "4")) == 0
    corpus = make_corpus(str(place / "text.txt"), ByteTokenizer(), 16)
    for name in ("whole", "tied"):
        run = place / "runs" / name
        model = make_model(str(run / "model"), 5)
        val_loss = json.loads((run / "summary.json").read_text())["val_loss"]
        assert evaluate(model, corpus.validation_batches(2, 16)) == pytest.approx(val_loss, rel=2e-3), name


def test_reference_alone(place, capsys):
    assert run_here(*new_run(place, "alone", "--steps", "3", "--reference")) == 0
    assert "plain fp32: validation loss" in capsys.readouterr().out
    assert not (place / "runs" / "alone" / "checkpoint").exists()


def test_a_trained_model_is_where_another_run_begins(place):
    weights = str(place / "runs" / "whole" / "model")
    arguments = new_run(place, "further", "--model", weights, "--steps", "2", "--lr", "1e-5", "--devices", "cpu")
    assert run_here(*arguments) == 0
    assert losses(place, "further")[0][1] < losses(place, "whole")[4][1]


def test_minutes_are_turned_into_steps_once(place):
    arguments = new_run(place, "timed", "--minutes", "0.02")
    where = arguments.index("--steps")
    del arguments[where : where + 2]
    assert run_here(*arguments) == 0
    settings = json.loads((place / "runs" / "timed" / "config.json").read_text())["settings"]
    assert settings["minutes"] is None
    assert settings["steps"] == len(losses(place, "timed")) >= 1


BAD_INPUT = [
    (("--devices", "cpu:0,tpu:7"), ("tpu:7", "there is")),
    (("--devices", "cuda:9"), ("cuda:9", "there is")),
    (("--budget", "cpu=100kB"), ("cpu", "kB")),
    (("--budget", "cpu=lots"), ("lots", "8GB")),
    (("--devices", "cpu:0,cpu:1,cpu:2,cpu:3,cpu:4,cpu:5,cpu:6,cpu:7"), ("8", "layers")),
    (("--schedule", "2f2b"), ("2f2b", "1f1b")),
    (("--transfer", "int3"), ("--transfer 'int3'", "int8")),
    (("--precision", "fp8"), ("--precision 'fp8'", "fp16")),
    (("--batch", "1"), ("--batch 1", "--batch 2 or more")),
    (("--lr", "-1"), ("--lr -1.0", "positive")),
    (("--seed", "9" * 20), ("--seed 9999", "to 9223372036854775807")),
    (("--beta2", "1"), ("--beta2 1", "below 1")),
    (("--engine", "distributed"), ("--engine distributed", "torchrun")),
    (("--out", "EMPTY"), ("--out", "EMPTY is a file")),
    (("--seq", "65"), ("--seq 65", "give 64 or less")),
    (("--data", "MISSING"), ("MISSING", "no such file")),
    (("--data", "EMPTY"), ("EMPTY", "is empty")),
    (("--model", "OPT", "--data", "DOCUMENTS"), ("see each other", "--pack off")),
    (("--data", "SHORT"), ("SHORT has 20 tokens", "--seq 16 needs at least 34")),
    (("--model", "MISSING"), ("MISSING", "no such file")),
    (("--model", "T5"), ("T5", "no causal decoder can be made from it")),
    (("--name", "whole"), ("--name whole", "--resume whole")),
    (("--name", "a/b"), ("a/b", "plain name")),
    (("--minutes", "1"), ("--steps and --minutes", "give one")),
    (("--resume", "whole"), ("--name", "leave --name out")),
    (("--microbatches", "many"), ("--microbatches", "many")),
    (("--colour", "red"), ("--colour",)),
    (("--learning-rate", "1e-3"), ("--learning-rate is not an option of spu train", "did you mean --lr?")),
    (("--fp16",), ("--fp16 is not an option", "did you mean --precision?")),
    (("--init-scale", "1e39"), ("init_scale", "at most 2**127")),
    (("--max-grad-norm", "0"), ("--max-grad-norm 0.0", "1e9, clips nothing")),
    (("--save-every", "1e2"), ("--save-every '1e2'", "write 100")),
    (("--plan", "MISSING"), ("cannot read the plan", "MISSING", "give a file that spu plan")),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the devices that must not exist may exist here")
@pytest.mark.parametrize(("options", "expected"), BAD_INPUT, ids=lambda value: "-".join(value)[:40])
def test_bad_input_names_value_and_fix_and_writes_nothing(place, capsys, options, expected):
    (place / "EMPTY").touch()
    (place / "SHORT").write_text("x" * 20)
    (place / "T5").write_text(json.dumps({"model_type": "t5", "vocab_size": 256, "d_model": 16, "num_layers": 2}))
    (place / "OPT").write_text(json.dumps({**TINY, "model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 16}))
    (place / "DOCUMENTS.jsonl").write_text('{"text": "short"}\n' * 90)
    files = {name: str(place / name) for name in ("MISSING", "EMPTY", "SHORT", "T5", "OPT")}
    files["DOCUMENTS"] = str(place / "DOCUMENTS.jsonl")
    before = snapshot(place)
    code = run_here(*new_run(place, "bad", *(files.get(option, option) for option in options)))
    error = capsys.readouterr().err
    assert code == 2, error
    for part in expected:
        assert part in error
    assert "Traceback" not in error
    assert snapshot(place) == before
    assert not (place / "runs" / "bad").exists()


def copy_run(place: Path, name: str) -> Path:
    """A run stopped half-way: a copy of `whole` that believes it has more steps to go."""
    import shutil

    target = place / "runs" / name
    shutil.copytree(place / "runs" / "whole", target)
    config = json.loads((target / "config.json").read_text())
    config["settings"]["steps"] = STEPS + 2
    (target / "config.json").write_text(json.dumps(config))
    return target


def expect_refusal(place: Path, capsys, run: Path, *expected: str, more: tuple[str, ...] = ()) -> None:
    before = snapshot(run)
    assert run_here("train", "--resume", str(run), *more) == 2
    error = capsys.readouterr().err
    for part in expected:
        assert part in error
    assert snapshot(run) == before


def test_corrupt_and_foreign_checkpoints_are_refused_and_kept(place, capsys):
    run = copy_run(place, "corrupt")
    tensors = next((run / "checkpoint").glob("*.safetensors"))
    content = bytearray(tensors.read_bytes())
    content[-20] ^= 1
    tensors.write_bytes(content)
    expect_refusal(place, capsys, run, tensors.name, "damaged")

    foreign = copy_run(place, "foreign")
    config = json.loads((foreign / "config.json").read_text())
    (place / "wider.json").write_text(json.dumps({**TINY, "hidden_size": 32}))
    config["settings"]["model"] = str(place / "wider.json")
    (foreign / "config.json").write_text(json.dumps(config))
    (foreign / "plan.json").unlink()
    expect_refusal(place, capsys, foreign, "another model")

    no_run = copy_run(place, "no-run")
    (no_run / "config.json").write_text("{}")
    expect_refusal(place, capsys, no_run, "config.json", "give another run")


def test_a_run_is_not_resumed_as_another_one(place, capsys):
    run = copy_run(place, "other")
    expect_refusal(place, capsys, run, "--lr 0.5 differs from the run's 0.002", more=("--lr", "0.5"))
    (place / "text2.txt").write_text((place / "text.txt").read_text() + "!")
    config = json.loads((run / "config.json").read_text())
    config["settings"]["data"] = str(place / "text2.txt")
    (run / "config.json").write_text(json.dumps(config))
    expect_refusal(place, capsys, run, "text2.txt has changed since the run began")
    assert run_here("train", "--resume", "nowhere", "--out", str(place / "runs")) == 2
    assert "no such run" in capsys.readouterr().err


def test_nan_from_the_start_is_an_error(place, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = place / "broken"
    shutil.copytree(place / "runs" / "whole" / "model", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert run_here(*new_run(place, "nan", "--model", str(broken))) == 2
    error = capsys.readouterr().err
    assert "the loss is nan from the start (step 1)" in error
    assert "check the weights, --lr" in error
    assert not (place / "runs" / "nan" / "checkpoint").exists()


def test_bare_resume_takes_the_latest_run(tmp_path, capsys):
    assert run_here("train", "--out", str(tmp_path), "--resume") == 2
    assert f"there is no run in {tmp_path}" in capsys.readouterr().err


def test_doctor_and_devices_print_their_tables(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SPU_CACHE", str(tmp_path))
    assert run_here("doctor") == 0
    output = capsys.readouterr().out
    assert "backend reference" in output
    assert run_here("devices", "--devices", "cpu:0,cpu:1") == 0
    output = capsys.readouterr().out
    assert "cpu:1" in output
    assert "GFLOP/s" in output
    assert "cpu:0 -> cpu:1" in output
    assert "loopback, between two processes" in output
    assert run_here("devices", "--devices", "npu") == 2
    assert "'npu'" in capsys.readouterr().err


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom spu.cli.app import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert "train" in result.stdout
