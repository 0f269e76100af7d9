"""The settings: checked in one place, and one more of them costs one line."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from spu import ModelParallelTrainer
from spu.common.dtypes import DTYPES
from spu.common.options import AUTO, kind_of
from spu.plan.memory import ITEM_BYTES
from spu.settings import PRECISIONS, Recompute, Settings, TrainSettings


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"schedule": "2f2b"}, "unknown schedule '2f2b': give one of gpipe, 1f1b, interleaved"),
        ({"precision": "fp8"}, "unknown precision 'fp8': give one of fp16, bf16, fp32"),
        ({"precision": None}, "unknown precision None"),
        ({"transfer": "int3"}, "unknown transfer 'int3': give one of auto, none, fp16"),
        ({"recompute": "on"}, "unknown recompute 'on': give one of auto, on .True., off .False., or a list of layers"),
        ({"recompute": [True]}, "unknown recompute"),
        ({"recompute": 1}, "unknown recompute 1"),
        ({"microbatches": 0}, "microbatches 0 must be a whole number of at least 1, or auto"),
        ({"microbatches": True}, "microbatches True must be"),
        ({"microbatches": "few"}, "microbatches 'few' must be"),
        ({"accumulate": AUTO}, "accumulate 'auto' must be a whole number of at least 1"),
        ({"virtual": 2}, "schedule '1f1b' has 1 stage on each rank, so virtual must be 1"),
        ({"virtual": 2, "schedule": AUTO}, "virtual 2 needs a schedule that is named"),
        ({"max_grad_norm": 0.0}, "max_grad_norm 0.0 must be a positive number"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm nan must be a positive number"),
        ({"seed": -1}, "seed -1 must be a whole number from 0 to 9223372036854775807"),
        ({"replan": 1}, "replan 1 must be true or false"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_what_is(values, reason):
    with pytest.raises(ValueError, match=reason):
        TrainSettings(**values)
    with pytest.raises(ValueError, match=reason):
        ModelParallelTrainer(nn.Sequential(nn.Linear(2, 2)), "cpu", **values)
    with pytest.raises(ValueError, match=reason):
        TrainSettings.from_json({**TrainSettings().to_json(), **values})


@pytest.mark.parametrize("value", [AUTO, True, False, [0, 3]])
def test_recompute_is_one_type_inside_and_what_the_user_writes_outside(value):
    settings = Settings(recompute=value)
    assert settings.recompute == Recompute.of(value)
    assert settings.to_json()["recompute"] == value
    assert Recompute.parse(str(settings.recompute)) == value


def test_settings_round_trip_through_json():
    settings = TrainSettings(recompute=[2, 1], schedule="zbv", virtual=2, max_grad_norm=1)
    assert TrainSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    with pytest.raises(ValueError, match=r"x\.max_grad_norm is missing"):
        TrainSettings.from_json(Settings().to_json(), "x.")
    with pytest.raises(ValueError, match=r"'colour' is not a setting; there are schedule"):
        Settings.from_json({**Settings().to_json(), "colour": 1})


def test_a_misspelt_keyword_is_named_with_its_nearest_match():
    with pytest.raises(TypeError, match="'microbatch' is not one of its keywords; did you mean microbatches"):
        ModelParallelTrainer(nn.Sequential(nn.Linear(2, 2)), "cpu", microbatch=2)


def test_the_trainer_takes_settings_as_keywords_and_as_one_object():
    given = TrainSettings(precision="fp32", microbatches=2, seed=3)
    with ModelParallelTrainer(nn.Sequential(nn.Linear(2, 2)), "cpu", settings=given, accumulate=2) as trainer:
        assert (trainer.settings.precision, trainer.settings.parts, trainer.seed) == ("fp32", 4, 3)


def test_the_trainer_recomputes_the_layers_that_are_named():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    with ModelParallelTrainer(model, "cpu", precision="fp32", microbatches=2, recompute=[1]) as trainer:
        assert trainer.prepare(torch.randn(2, 2)).stages[0].recompute == (1,)
    with (
        ModelParallelTrainer(model, "cpu", microbatches=2, recompute=[3]) as trainer,
        pytest.raises(ValueError, match="recompute names layer 3, but there are layers 0 to 2"),
    ):
        trainer.prepare(torch.randn(2, 2))


def test_precisions_have_dtypes_and_sizes():
    assert set(PRECISIONS) == set(DTYPES)
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEM_BYTES


def test_the_trainer_shows_every_setting_in_its_signature_and_documentation():
    parameters = inspect.signature(ModelParallelTrainer).parameters
    assert list(parameters)[:2] == ["model", "devices"]
    assert "keywords" not in parameters
    for name, start in TrainSettings().to_json().items():
        assert parameters[name].default == start
        assert f"        {name}: " in ModelParallelTrainer.__doc__


def test_every_setting_has_a_sentence():
    for field in Settings.__dataclass_fields__.values():
        assert kind_of(field).about.endswith("."), field.name


ONE_MORE = """
import importlib.util, inspect, json, sys
from pathlib import Path

import spu

FIELD = '    paging: str = choice("never", "Where weights stay between uses.", ["never", "often"])\\n\\n'
spec = importlib.util.find_spec("spu.settings")
source, check = Path(spec.origin).read_text(encoding="utf-8"), "    def check(self) -> None:\\n"
assert source.count(check) == 1
sys.modules["spu.settings"] = module = importlib.util.module_from_spec(spec)
exec(compile(source.replace(check, FIELD + check), spec.origin, "exec"), module.__dict__)

import torch
from torch import nn

from spu import ModelParallelTrainer
from spu.cli.app import main
from spu.train.config import TrainConfig
from spu.train.options import read_options
from spu.plan import Plan


def refusal(call, *arguments, **keywords):
    try:
        call(*arguments, **keywords)
    except ValueError as error:
        return str(error)
    raise AssertionError("it was taken")


def trainer(**settings):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    return ModelParallelTrainer(model, ["cpu:0", "cpu:1"], precision="fp32", microbatches=2, **settings)


file = Path(sys.argv[1]) / "job.yaml"
file.write_text("paging: often")
(values,) = read_options({"config": str(file)}, TrainConfig)
config = TrainConfig(**values)
assert config.to_json()["paging"] == "often"
assert TrainConfig.from_json(config.to_json()) == config
file.write_text("pagin: often")
assert "did you mean paging?" in refusal(read_options, {"config": str(file)}, TrainConfig)
assert refusal(read_options, {"paging": "here"}, TrainConfig) == (
    "unknown --paging 'here': give one of never, often"
)

assert inspect.signature(ModelParallelTrainer).parameters["paging"].default == "never"
assert "paging: Where weights stay between uses. One of never, often." in ModelParallelTrainer.__doc__
assert refusal(trainer, paging="here") == "unknown paging 'here': give one of never, often"
batch = torch.randn(4, 2)
with trainer(paging="often") as it:
    plan = it.prepare(batch, batch)
data = json.loads(plan.to_json())
assert data["settings"]["paging"] == "often"
assert Plan.from_json(data) == plan
data["settings"]["paging"] = "here"
assert refusal(Plan.from_json, data) == "the plan: unknown settings.paging 'here': give one of never, often"
with trainer(plan=plan) as it:
    assert "the plan is for paging='often', but the trainer has 'never'" in refusal(it.prepare, batch, batch)

for command in ("train", "plan"):
    try:
        main([command, "--help"])
    except SystemExit:
        pass
"""


def test_a_new_setting_is_one_line(tmp_path):
    """It reaches the command line, YAML, plan files and the trainer without another line of code."""
    pytest.importorskip("typer")
    pytest.importorskip("yaml")
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", ONE_MORE, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--paging") == 2
    assert done.stdout.count("Where weights stay between uses. One of never, often.  (never)") == 2
