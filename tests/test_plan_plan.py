"""Plans as files: exact round trips, and clear errors for edited, foreign and broken ones."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest

from spu.plan import Plan, Predicted, StagePlan
from spu.settings import Settings


def stage(device, first, last, **changes):
    numbers = {"param_bytes": 10, "main_grad_bytes": 20, "master_bytes": 20, "moment_bytes": 40, "saved_bytes": 6}
    numbers |= {"wire_bytes": 3, "workspace_bytes": 1, "budget_bytes": 1000, "each_bytes": 3, "left_bytes": 0}
    numbers |= {"recompute": (), "forward_s": 0.1, "backward_s": 1 / 3, "weight_s": 0.0, "update_s": 0.25}
    names = tuple(f"layers.{k}" for k in range(first, last))
    return StagePlan(device=device, layers=(first, last), layer_names=names, **{**numbers, **changes})


PLAN = Plan(
    model="tiny",
    settings=Settings(accumulate=2),
    rows=2,
    tokens=128,
    codecs=("int8",),
    stages=(stage("cpu:0", 0, 2), stage("cpu:1", 2, 5, saved_bytes=8, recompute=(3,))),
    predicted=Predicted(7.8, 0.25, 1 / 9, (1e-5,), (2000,), (100, 102), "measured"),
)
DATA = json.loads(PLAN.to_json())


def edited(path, value):
    """The plan's JSON with one entry changed, or left out if ``value`` is ...; ``path`` is written stages.0.layers."""
    data = copy.deepcopy(DATA)
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    entry = data
    for key in way:
        entry = entry[key]
    if value is ...:
        del entry[last]
    else:
        entry[last] = value
    return data


def test_json_round_trips_exactly(tmp_path):
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert Plan.from_json(DATA) == PLAN
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_the_file_shows_totals_and_the_version():
    assert [entry["total_bytes"] for entry in DATA["stages"]] == [100, 102]
    assert (DATA["format"], DATA["version"]) == ("spu plan", 7)


def test_a_plan_can_be_edited_by_hand():
    data = edited("settings.microbatches", 16)
    data["stages"][0].update(layers=[0, 1], layer_names=["layers.0"])
    data["stages"][1].update(layers=[1, 5], layer_names=["layers.1", "layers.2", "layers.3", "layers.4"])
    del data["stages"][0]["total_bytes"]
    plan = Plan.from_json(json.dumps(data))
    assert (plan.settings.microbatches, plan.stages[0].layers, plan.stages[1].layers) == (16, (0, 1), (1, 5))
    assert Plan.from_json(edited("stages.0.forward_s", 1)).stages[0].forward_s == 1.0  # a whole number of seconds


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("format", ..., 'not an spu plan (no "format": "spu plan")'),
        ("version", 1, "version is 1, this spu reads 7; make the plan again"),
        ("version", ..., "version is None, this spu reads 7"),
        ("settings.schedule", ..., "settings.schedule is missing"),
        ("settings.schedule", "zigzag", "unknown settings.schedule 'zigzag': give one of gpipe, 1f1b"),
        ("settings.schedule", "auto", "must be a schedule and a number here, not auto"),
        ("settings.precision", "fp8", "unknown settings.precision 'fp8': give one of fp16, bf16, fp32"),
        ("settings.microbatches", "8", "settings.microbatches '8' must be a whole number"),
        ("settings.microbatches", 8.5, "settings.microbatches 8.5 must be a whole number"),
        ("settings.microbatches", True, "settings.microbatches True must be a whole number"),
        ("settings.microbatches", 0, "settings.microbatches 0 must be a whole number of at least 1"),
        ("settings.recompute", [-1], "unknown settings.recompute [-1]: give one of auto, on (True), off (False)"),
        ("settings.recompte", True, "settings.'recompte' is not a setting; did you mean recompute?"),
        ("settings", [], "settings must be an object, got []"),
        ("stages.1.recompute", [1], "stages[1].recompute names layer 1, which is not one of its [2, 5]"),
        ("stages.0.recompute", True, "stages[0].recompute must be a list, got True"),
        ("predicted.peak_bytes", [1], "predicted.peak_bytes must have one entry per device, 2, got 1"),
        ("predicted.link_bytes", [], "predicted.link_bytes must have one entry per boundary, 1, got 0"),
        ("codecs", ["zip"], "codecs[0] is 'zip'; there are 'none', 'fp16', 'bf16', 'int8'"),
        ("codecs", [], "codecs must have one entry per boundary, 1, got 0"),
        ("codecs", "int8", "codecs must be a list, got 'int8'"),
        ("colour", "red", "colour is not an entry of a plan; there are model, settings"),
        ("stages", [], "stages is empty; a plan has at least one stage"),
        ("stages", {}, "stages must be a list, got {}"),
        ("stages", ["x"], "stages[0] must be an object, got 'x'"),
        ("stages.1.device", "cpu:0", "2 stages on each of 1 devices: schedule '1f1b' has 1 stage on each rank"),
        ("stages.0.layers", [0, 3], "stages[0].layers [0, 3] are 3 layers, but layer_names has 2; move the names"),
        ("stages.0.layers", [0], "stages[0].layers must be a list of 2, got [0]"),
        ("stages.1.layers", [3, 6], "stages[1].layers is [3, 6], but must start at 2"),
        ("stages.1.layers", [2, 2], "stages[1].layers is [2, 2], but must start at 2 and hold at least one layer"),
        (
            "stages.0.saved_bytes",
            7,
            "stages[0].total_bytes is 100, but its parts add up to 101; correct it or leave it out",
        ),
        ("stages.0.budget_bytes", -1, "stages[0].budget_bytes must be finite and not negative, got -1"),
        ("stages.0.layer_names", [1, 2], "stages[0].layer_names[0] must be a text, got 1"),
        ("stages.0.forward_s", ..., "stages[0].forward_s is missing"),
        ("predicted.step_s", float("nan"), "predicted.step_s must be finite and not negative, got nan"),
        ("predicted.transfer_s", [], "predicted.transfer_s must have one entry per boundary, 1, got 0"),
        ("predicted", None, "predicted must be an object, got None"),
    ],
)
def test_a_bad_entry_is_named_with_its_value(tmp_path, path, value, reason):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(edited(path, value)))
    with pytest.raises(ValueError) as error:
        Plan.load(file)
    assert reason in str(error.value)
    assert str(error.value).startswith(f"{file}: ")


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"model": "x"}', "\x00\xff"])
def test_what_is_no_plan_is_named_by_its_file(tmp_path, content):
    file = tmp_path / "other.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"other\.json"):
        Plan.load(file)
    with pytest.raises(ValueError, match=r"cannot read the plan .*none\.json"):
        Plan.load(tmp_path / "none.json")


def test_the_timeline_is_that_of_the_schedule():
    timeline = PLAN.timeline()
    assert timeline.stages == 2
    assert timeline.makespan == pytest.approx(9 * (0.1 + 1 / 3), rel=1e-3)


def test_the_table_is_aligned_and_says_everything():
    lines = PLAN.table().splitlines()
    assert lines[0] == "tiny: 1f1b, 8 microbatches; 2 times per step; fp16; recompute of 1 of 5 layers; transfer int8"
    assert lines[3].startswith("0      cpu:0   layers.0 .. layers.1 (2)")
    assert lines[4].startswith("1      cpu:1   layers.2 .. layers.4 (3)")
    assert lines[3].endswith("100 B  1.00 kB   100 ms    333 ms  250 ms")
    assert len(lines[1]) == len(lines[2]) == len(lines[3])
    assert lines[5] == "predicted: 7.8 s per step, 250 ms of it the update; idle share 11.1% (measured)"
    assert PLAN.table(len(lines[1])).splitlines() == lines


def test_a_table_that_is_too_wide_has_stages_as_columns():
    """On a terminal of 90 columns every row was broken in two."""
    wide, lines = PLAN.table().splitlines(), PLAN.table(90).splitlines()
    assert max(map(len, lines[1:-1])) <= 90
    assert (lines[0], lines[-1]) == (wide[0], wide[-1])
    assert lines[1].split() == ["stage", "0", "1"]
    assert set(lines[2]) == {"-", " "}
    assert lines[3].split() == ["device", "cpu:0", "cpu:1"]
    assert [line.split()[0] for line in lines[4:-1]] == [
        *("layers", "weights", "main", "masters", "moments", "activations", "wires", "workspace", "total", "budget"),
        *("forward", "backward", "update"),
    ]


def test_a_plan_is_read_without_torch(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    code = "import sys\nfrom spu.plan import Plan\nPlan.load(sys.argv[1])\nassert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code, str(tmp_path / "plan.json")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
